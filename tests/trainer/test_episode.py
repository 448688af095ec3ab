"""The token buffer: what is masked, what is kept, what an infrastructure failure clears."""

from __future__ import annotations

import pytest

from trainer.episode import Episode, Status


def played() -> Episode:
    episode = Episode.start("t", 2, [7, 8], weight_version=5)
    episode.sampled([1, 2], [-0.1, -0.2], "ls\n", "stop")
    episode.observed([9, 9, 9], "a\n$ ")
    episode.sampled([3], [-0.3], "x", "length")
    return episode


def test_prompt_and_observation_are_masked_and_the_stop_token_is_not() -> None:
    episode = played()
    assert episode.ids == [7, 8, 1, 2, 9, 9, 9, 3]
    assert episode.mask == [0, 0, 1, 1, 0, 0, 0, 1]
    assert episode.logprobs == [0, 0, -0.1, -0.2, 0, 0, 0, -0.3]
    assert (episode.prompt_length, episode.response_length, episode.action_tokens) == (2, 6, 3)
    assert [(t.start, t.end) for t in episode.turns] == [(2, 4), (7, 8)]
    assert episode.weight_version == 5


def test_padding_is_never_read_off_the_ids() -> None:
    """A stop token that equals the padding id still counts: SmolLM2 has pad == eos."""
    episode = Episode.start("t", 0, [1])
    episode.sampled([5, 2], [-1.0, -1.0])
    assert episode.mask == [0, 1, 1]


def test_scored_episodes_are_valid_whatever_their_end() -> None:
    for status in (Status.OK, Status.TRUNCATED, Status.TIMEOUT):
        assert played().finish(1.0, status).valid


def test_infrastructure_clears_mask_logprobs_and_reward() -> None:
    episode = played().finish(1.0, Status.INFRA, "server gone")
    assert not episode.valid
    assert episode.mask == [0] * 8 and episode.logprobs == [0.0] * 8 and episode.reward == 0
    assert episode.error == "server gone"


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        Episode.start("t", 0, [])
    with pytest.raises(ValueError, match="2 sampled ids but 1"):
        Episode.start("t", 0, [1]).sampled([1, 2], [-0.1])
