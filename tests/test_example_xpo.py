"""xpo.py: what all scripts are tested for, what it shares with online_dpo.py and nash_md.py, and what only it has to show."""

import shutil
import sys

import pytest
from examples import EXAMPLES, PROMPT, SHORT, functions, load, logged
from test_example_online_dpo import LORA, OnlinePairs


class TokensForTheRewardModel(OnlinePairs):
    """What xpo.py and nash_md.py have in common: the reward model reads the policy's tokens, and is the only judge."""

    removed = "1.14"

    def test_what_it_shares_with_online_dpo_is_the_same_to_the_letter(self):
        own, other = functions(self.name), functions("online_dpo")
        for function in ("short_prompts", "load_policy", "sample_pairs"):
            assert own[function] == other[function]

    def test_a_newer_trl_is_refused_with_what_to_do(self, monkeypatch):
        monkeypatch.setitem(sys.modules, f"trl.experimental.{self.name}", None)  # as if it were not there
        with pytest.raises(SystemExit) as stopped:
            load(EXAMPLES / f"{self.name}.py")
        for part in ("removed in TRL 1.14", f"uv run {self.name}.py", "pip install 'trl==", "online_dpo.py"):
            assert part in str(stopped.value)

    def test_the_scores_on_the_screen_are_those_of_the_trainer(self, script, trained, monkeypatch):
        """The reward model gets one row here, and a padded batch in TRL's own code."""
        import torch

        seen = []
        sample_pairs = script.sample_pairs
        monkeypatch.setattr(
            script,
            "sample_pairs",
            lambda trainer, rows: seen.append((rows, sample_pairs(trainer, rows))) or seen[-1][1],
        )
        trainer = trained(*SHORT, "--max_new_tokens", "33")
        [(rows, (first, second))] = seen
        tokenizer = trainer.processing_class
        prompts = [script.prompt_ids(row, tokenizer) for row in rows]
        context = max(map(len, prompts))
        batches = []
        for answers in (first, second):
            width = max(map(len, answers))
            batches.append(
                {
                    "input_ids": torch.tensor(
                        [
                            [0] * (context - len(prompt)) + prompt + answer + [0] * (width - len(answer))
                            for prompt, answer in zip(prompts, answers, strict=True)
                        ]
                    )
                }
            )
        theirs = [scores.tolist() for scores in trainer._compute_rewards(*batches, context)]
        for answers, scores in zip((first, second), theirs, strict=True):
            ours = [script.score(trainer, row, answer) for row, answer in zip(rows, answers, strict=True)]
            assert ours == pytest.approx(scores, abs=1e-3)

    def test_with_an_adapter_the_reference_stays_the_reference(self, script, trained, monkeypatch):
        """Without a reference of its own, TRL samples the other answer with the adapter on."""
        import torch

        trainer = trained(*LORA, *SHORT)
        assert trainer.ref_model is not None
        tokens = torch.tensor([script.prompt_ids({"prompt": "7+9+3 "}, trainer.processing_class)])
        with torch.no_grad():
            adapted = trainer.model(tokens).logits
            reference = trainer.ref_model(tokens).logits
            with trainer.model.disable_adapter():
                base = trainer.model(tokens).logits
        assert torch.equal(reference, base)
        assert not torch.allclose(adapted, base, atol=1e-3)

    # -- bad input -------------------------------------------------------------------------------------------------------

    def test_a_reward_model_with_another_vocabulary_is_refused(self, other_words, real, refused):
        message = refused(*real(), "--reward_model_path", other_words)
        assert "another vocabulary" in message
        assert "'7'" in message or "'8'" in message

    def test_vllm_is_refused(self, refused):
        assert "--use_vllm" in refused("--use_vllm")

    def test_a_penalty_that_nobody_would_pay_is_refused(self, call, real, refused, tmp_path):
        """TRL looks for the end token in prompt and answer together."""
        assert "--missing_eos_penalty" in refused("--missing_eos_penalty", "1.0")
        mixed = [self.formats["text"]] * 7 + [{"prompt": PROMPT + "<|end|>"}]  # then only some answers would pay
        assert "--missing_eos_penalty" in refused(*real(mixed), "--missing_eos_penalty", "1.0")
        shutil.rmtree(tmp_path / "data")
        call(*real([self.formats["text"]] * 8), "--missing_eos_penalty", "1.0")  # these prompts hold none
        assert set(logged(tmp_path / "outputs" / f"{self.name}-qwen3")) == {1}


class TestXPO(TokensForTheRewardModel):
    name = "xpo"
    lists = ("beta", "alpha")
    printed = {
        "prompt_ids": r"<\|user\|>[\d+]+<\|end\|><\|assistant\|>",
        "chosen": r".*#\d+<\|end\|>",
        "rejected": r".*#\d+<\|end\|>",
    }

    def test_the_policy_starts_as_the_reference_and_leaves_it(self, call, tmp_path):
        for output, flags in (("whole", ("--learning_rate", "1e-3")), ("lora", LORA)):
            call(*flags, *SHORT, "--output_dir", output)
            log = logged(tmp_path / output)
            assert log[1]["loss/dpo"] == pytest.approx(0.6931, abs=1e-4)
            assert log[1]["objective/kl"] == pytest.approx(0, abs=1e-4)
            assert abs(log[2]["objective/kl"]) > 1e-3

    def test_alpha_pushes_the_answers_of_the_reference_down(self, call, tmp_path):
        for alpha in ("0", "5"):
            call("--max_steps", "4", "--logging_steps", "1", "--alpha", alpha, "--output_dir", alpha)
        without, pushed = (logged(tmp_path / alpha) for alpha in ("0", "5"))
        assert without[1]["loss/xpo"] == 0
        assert pushed[1]["loss/xpo"] < -1  # 5 * log-probability
        assert pushed[4]["objective/entropy"] > without[4]["objective/entropy"] + 0.5

    def test_the_better_answer_is_the_chosen_one(self, call, capsys):
        call(*SHORT)
        printed = capsys.readouterr().out.splitlines()
        place = next(n for n, line in enumerate(printed) if line.startswith("chosen"))
        points = [float(printed[place + n].split()[-1]) for n in (1, 3)]
        assert points[0] > points[1]
        assert {printed[place + n].split(",")[0].split()[-1] for n in (1, 3)} == {"policy", "reference"}

    def test_checkpointed_gradients_do_not_turn_off_the_cache(self, trained, real):
        trainer = trained(*real(), "--gradient_checkpointing", "true")
        assert trainer.generation_config.use_cache
        assert trainer.model.is_gradient_checkpointing
