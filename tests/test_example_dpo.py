"""dpo.py: what all scripts are tested for, and what only this one has to show."""

import pytest
from examples import PREFERENCE, SHORT, Example, losses


class TestDPO(Example):
    name = "dpo"
    formats = PREFERENCE
    needs = ({"chosen", "rejected"},)
    at_start = {"loss": (0.6931, 1e-4)}  # log 2: the policy is still the reference
    printed = {
        "prompt_ids": r"<\|user\|>[\d+]+<\|end\|><\|assistant\|>",
        "chosen_ids": r".*#\d+<\|end\|>",
        "rejected_ids": r".*<\|end\|>",
    }
    flags = ("--max_length", "64")

    def test_an_adapter_starts_as_the_reference(self, call, tmp_path):
        call("--use_peft", "--lora_r", "4", "--learning_rate", "1e-3", *SHORT, "--output_dir", "lora")
        assert losses(tmp_path / "lora")[1] == pytest.approx(0.6931, abs=1e-3)

    def test_an_adapter_depends_on_the_seed_alone(self, call, tmp_path):
        for output in ("one", "two"):
            call("--use_peft", "--lora_r", "4", "--learning_rate", "1e-3", *SHORT, "--output_dir", output)
        assert losses(tmp_path / "one") == losses(tmp_path / "two")

    def test_pairs_that_lose_their_beginning_are_trained_on(self, call, real, tmp_path):
        call(*real(), "--truncation_mode", "keep_end", "--max_length", "12")
        assert set(losses(tmp_path / "outputs" / "dpo-qwen3")) == {1}

    def test_a_max_length_that_cuts_every_pair_is_refused(self, real, refused):
        flags = real()
        for length in ("20", "4"):  # the answers are cut; the prompt alone does not fit, and TRL drops every row
            assert f"max_length={length}" in refused(*flags, "--max_length", length)

    def test_conversations_beside_a_text_need_a_chat_template_too(self, real, refused, own_model):
        (own_model / "chat_template.jinja").unlink()
        rows = [PREFERENCE["HuggingFaceH4/ultrafeedback_binarized"]] * 4
        assert "no chat template" in refused(*real(rows, model=own_model))
