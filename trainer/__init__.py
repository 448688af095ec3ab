"""PPO with asynchronous rollouts in sandboxes."""
