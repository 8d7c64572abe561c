"""rloo.py: what all scripts are tested for, what it shares with grpo.py, and what only this one has to show."""

import pytest
import test_example_grpo
from examples import SHORT, functions, logged


class TestRLOO(test_example_grpo.TestGRPO):
    name = "rloo"
    printed = test_example_grpo.TestGRPO.printed | {"exact_answer": r"[01]\.0( [01]\.0){3}"}
    looked_at = 16

    def test_the_loss_starts_at_zero_and_its_gradient_does_not(self, call, tmp_path):
        call(*SHORT, "--output_dir", "run")
        first = logged(tmp_path / "run")[1]
        assert first["loss"] == pytest.approx(0, abs=1e-6)  # whole answers, so that their lengths do not matter
        assert first["grad_norm"] > 0.5
        assert first["kl"] == pytest.approx(0, abs=1e-6)

    def test_what_it_shares_with_grpo_is_the_same_to_the_letter(self):
        own, other = functions("rloo"), functions("grpo")
        assert set(own) == set(other)
        assert [name for name in own if own[name] != other[name]] == ["build"]

    def test_the_penalty_counts_and_is_not_in_the_logged_reward(self, call, tmp_path):
        flags = ["--max_steps", "4", "--logging_steps", "1"]
        for beta in ("0", "0.5"):
            call(*flags, "--beta", beta, "--output_dir", f"beta-{beta}")
        free, held = logged(tmp_path / "beta-0"), logged(tmp_path / "beta-0.5")
        assert free[1]["reward"] == held[1]["reward"]
        assert "kl" not in free[1]
        assert abs(held[4]["kl"]) > 1e-5
        assert free[4]["grad_norm"] != held[4]["grad_norm"]

    def test_an_adapter_starts_as_the_reference(self, call, tmp_path):
        call("--use_peft", "--lora_r", "4", "--learning_rate", "1e-3", *SHORT, "--output_dir", "lora")
        assert logged(tmp_path / "lora")[1]["kl"] == pytest.approx(0, abs=1e-6)

    def test_fresh_answers_have_a_ratio_of_one_with_an_adapter_too(self, call, tmp_path):
        """With its dropout on, the loss of the second step is not 0, because TRL scores answers twice."""
        flags = ["--use_peft", "--lora_dropout", "0.3", "--learning_rate", "1e-2", *SHORT]
        for name, more in (("off", []), ("on", ["--disable_dropout", "false"])):
            call(*flags, *more, "--output_dir", name)
        off, on = logged(tmp_path / "off")[2], logged(tmp_path / "on")[2]
        assert off["loss"] == pytest.approx(0, abs=1e-5)
        assert off["clip_ratio/region_mean"] == 0
        assert abs(on["loss"]) > 1e-3
