"""nash_md.py: what all scripts are tested for, what it shares with xpo.py, and what only it has to show."""

import pytest
from examples import SHORT, functions, logged
from test_example_online_dpo import LORA
from test_example_xpo import TokensForTheRewardModel


class TestNashMD(TokensForTheRewardModel):
    name = "nash_md"
    lists = ("beta", "mixture_coef")
    printed = {
        "prompt_ids": r"<\|user\|>[\d+]+<\|end\|><\|assistant\|>",
        "answer": r".*#\d+<\|end\|>",
        "rival": r".*#\d+<\|end\|>",
        "P": r"[01]\.\d{3}",
    }

    def test_what_it_shares_with_xpo_is_the_same_to_the_letter(self):
        own, other = functions("nash_md"), functions("xpo")
        assert set(own) == set(other)
        same = {name for name in own if own[name] == other[name]}
        assert set(own) - same == {"check_flags", "load_reward_model", "build", "show_row"}

    def test_the_policy_starts_as_the_reference_and_leaves_it(self, call, tmp_path):
        for output, flags in (("whole", ("--learning_rate", "1e-3")), ("lora", LORA)):
            call(*flags, *SHORT, "--output_dir", output)
            log = logged(tmp_path / output)
            assert log[1]["loss/kl"] == pytest.approx(0, abs=1e-4)
            assert abs(log[2]["loss/kl"]) > 1e-3

    def test_a_loss_type_is_refused(self, refused):
        assert "--loss_type" in refused("--loss_type", "ipo")

    def test_columns_that_trl_stumbles_over_do_no_harm(self, call, real, tmp_path):
        row = {"prompt": [{"role": "user", "content": "1+1"}]}
        messages = [*row["prompt"], {"role": "assistant", "content": "1+1=2 #2"}]
        call(*real([row | {"messages": messages}] * 8))
        assert set(logged(tmp_path / "outputs" / "nash_md-qwen3")) == {1}

    def test_the_rival_is_as_good_as_the_policy_at_the_start(self, call, tmp_path):
        """With a cache, into which both models of the mixture write, its answers would be noise."""
        call(*SHORT, "--output_dir", "run")
        first = logged(tmp_path / "run")[1]
        assert first["rewards/chosen"] == pytest.approx(first["rewards/rejected"], abs=4)
        assert first["rewards/rejected"] > -3  # noise would get about -8
        assert first["rewards/probabilities"] == pytest.approx(0.5, abs=0.2)
        assert first["val/ref_contain_eos_token"] > 0.9

    def test_the_cache_stays_off_whatever_is_asked_for(self, trained, real):
        flags = real()
        for value in ("true", "false"):
            trainer = trained(*flags, "--gradient_checkpointing", value, "--output_dir", value)
            assert not trainer.generation_config.use_cache
