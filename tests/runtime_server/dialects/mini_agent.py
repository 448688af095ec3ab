"""mini-swe-agent with its SWE-ReX environment, connected to a sandbox that exists: URL KEY DIRECTORY.

A process of its own, for its environment runs event loops of its own.
"""

from __future__ import annotations

import asyncio
import sys

from minisweagent.agents.default import DefaultAgent
from minisweagent.environments.extra.swerex_docker import (
    SwerexDockerEnvironment,
    SwerexDockerEnvironmentConfig,
)
from minisweagent.models.test_models import DeterministicModel, make_output
from swerex.deployment.remote import RemoteDeployment


class Environment(SwerexDockerEnvironment):
    """Its commands and results, unchanged; the deployment is SWE-ReX's own for a server that runs."""

    def __init__(self, url: str, key: str) -> None:
        self.config = SwerexDockerEnvironmentConfig(image="", cwd="/tmp", timeout=20)
        self.deployment = RemoteDeployment(host=url, auth_token=key)
        asyncio.run(self.deployment.start())


def main(url: str, key: str, folder: str) -> None:
    commands = [
        "echo 'print(6 * 6)' > answer.py && python3 answer.py",
        "sed -i 's/6 \\* 6/6 * 7/' answer.py; ls /nowhere; python3 answer.py",
        "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT; echo fixed $(python3 answer.py)",
    ]
    outputs = [make_output(f"run it\n```bash\n{text}\n```", [{"command": text}]) for text in commands]
    agent = DefaultAgent(
        DeterministicModel(outputs=outputs),
        Environment(url, key),
        system_template="You fix things.",
        instance_template="{{task}}",
        step_limit=10,
        cost_limit=0,
    )
    found = agent.run("make it say 42")
    seen = str(agent.messages)
    assert "36" in seen and "No such file" in seen, seen
    print(f"{found['exit_status']}: {found['submission'].strip()}")


if __name__ == "__main__":
    main(*sys.argv[1:])
