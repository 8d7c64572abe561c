"""sft.py: what all scripts are tested for, and what only this one has to show."""

import json
import re
from pathlib import Path

import pytest
from examples import ASSISTANT, PROMPT, RIGHT, TOY, USER, Example, losses, tiny_model

TURNS = USER + ASSISTANT + [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "1+1=2 #2"}]


def stretches(text: str) -> list[tuple[str, str]]:
    """The printed row: (no loss or loss, decoded tokens)."""
    return re.findall(r"^(no loss|loss) +(.*)$", text.split("\n{")[0], re.M)


class TestSFT(Example):
    name = "sft"
    formats = {  # TRL's formats: https://huggingface.co/docs/trl/dataset_formats
        "conversation": {"messages": USER + ASSISTANT},
        "conversational prompt and completion": {"prompt": USER, "completion": ASSISTANT},
        "text prompt and completion": {"prompt": PROMPT + " ", "completion": RIGHT},
        "text": {"text": f"{PROMPT} {RIGHT}"},
    }
    needs = ({"prompt", "completion"}, {"messages"}, {"text"})
    at_start = {"mean_token_accuracy": (1.0, 1e-3)}  # greedily the base is right; it slips when it samples
    least = 0.95
    printed = {
        "no loss": r"<\|user\|>[\d+]+<\|end\|><\|assistant\|>",
        "loss": r"[\d+= ]+ #\d+<\|end\|>",
    }
    flags = ("--max_length", "64")

    # -- which tokens carry loss -----------------------------------------------------------------------------------------

    @pytest.mark.parametrize(
        ("row", "flags", "shown"),
        [
            ({"messages": TURNS}, (), [False, True, False, True]),
            ({"messages": TURNS}, ("--assistant_only_loss", "false"), [True]),
            ({"prompt": TURNS[:3], "completion": TURNS[3:]}, (), [False, True]),
            ({"prompt": TURNS[:3], "completion": TURNS[3:]}, ("--completion_only_loss", "false"), [False, True] * 2),
            ({"prompt": PROMPT + " ", "completion": RIGHT}, (), [False, True]),
            ({"text": f"{PROMPT} {RIGHT}"}, (), [True]),
        ],
    )
    def test_the_printed_row_shows_which_tokens_carry_loss(self, row, flags, shown, call, real, capsys):
        call(*real([row] * 4), *flags)
        found = stretches(capsys.readouterr().out)
        assert [kind == "loss" for kind, _ in found] == shown
        last = row["text"] if "text" in row else (row.get("messages") or row["completion"])
        last = last if isinstance(last, str) else last[-1]["content"]
        assert found[-1][1].endswith(last.split(" ")[-1] + "<|end|>")  # text gets the end token too
        if shown[0] is False:
            assert found[0][1].endswith("<|assistant|>" if isinstance(row.get("prompt", []), list) else PROMPT + " ")

    @pytest.mark.parametrize(
        "others",
        [
            {"source": "Airoboros", "num_turns": 2},  # trl-lib/Capybara, the default
            {"prompt": PROMPT, "prompt_id": "f0e37e9f"},  # HuggingFaceH4/ultrachat_200k: TRL would look for completion
        ],
        ids=["Capybara", "ultrachat"],
    )
    def test_conversations_with_more_columns(self, others, call, real, tmp_path, capsys):
        call(*real([{"messages": TURNS} | others] * 4))
        found = stretches(capsys.readouterr().out)
        assert [text for kind, text in found if kind == "loss"] == [RIGHT + "<|end|>", "1+1=2 #2<|end|>"]
        assert set(losses(tmp_path / "outputs" / "sft-qwen3")) == {1}

    def test_qwen3_learns_its_answers_although_its_template_marks_none(self, call, real, tmp_path, capsys):
        """TRL knows this template and takes its own variant of it, with marks, while it makes the labels."""
        import transformers
        import trl

        model = tiny_model(tmp_path / "qwen3", "Qwen3")
        template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
        assert "generation %}" not in template
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
        tokenizer.eos_token, tokenizer.chat_template = "<|im_end|>", template
        tokenizer.save_pretrained(model)
        weights = transformers.AutoModelForCausalLM.from_pretrained(model)
        weights.resize_token_embeddings(len(tokenizer))
        weights.save_pretrained(model)

        call(*real([{"messages": TURNS}] * 4, model=model), "--max_length", "512")
        printed = capsys.readouterr().out
        answers = re.findall(r"^loss +(.*?)<\|im_end\|>", printed, re.M | re.S)
        assert answers == [f"<think>\n\n</think>\n\n{text}" for text in (RIGHT, "1+1=2 #2")]
        saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "outputs" / "sft-qwen3")
        assert saved.chat_template == template  # the variant is for the labels only

    # -- what comes after it ---------------------------------------------------------------------------------------------

    def test_its_folder_is_a_model_for_the_next_run(self, bare, call, real, tmp_path):
        output, _ = bare
        problem = [{"role": "user", "content": "1+2+3+4+5"}]
        answer = [{"role": "assistant", "content": "1+2=3 3+3=6 6+4=10 10+5=15 #15"}]
        call(*real([{"prompt": problem, "completion": answer}] * 8, model=output), "--output_dir", "next")
        call(*real(model=TOY / "policy", data=tmp_path / "data"), "--output_dir", "base")
        assert (
            losses(tmp_path / "next")[1] < losses(tmp_path / "base")[1] / 3
        )  # it starts with what the first run learned

    # -- bad input -------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("row", list(formats.values())[:3], ids=list(formats)[:3])
    def test_a_max_length_that_cuts_every_answer_is_refused(self, row, real, refused):
        flags = real([row] * 4)
        message = refused(*flags, "--max_length", "4")  # TRL drops rows without a token to learn
        assert "max_length=4 tokens end before the first answer begins" in message
        message = refused(*flags, "--max_length", "20")
        assert "max_length=20" in message
        assert "learn to stop" in message

    def test_some_cut_answers_are_counted(self, call, real, capsys):
        rows = [{"messages": [*USER, {"role": "assistant", "content": content}]} for content in ("#1", RIGHT)] * 2
        call(*real(rows), "--max_length", "20")
        assert "2 of the first 4 rows fill max_length=20" in capsys.readouterr().out

    def test_a_template_without_marks_is_refused_and_a_flag_helps(self, call, real, refused, own_model, tmp_path):
        path = own_model / "chat_template.jinja"
        path.write_text(re.sub(r"\{% (end)?generation %\}", "", path.read_text()))
        flags = real(model=own_model)
        message = refused(*flags)
        assert "{% generation %}" in message
        assert "--assistant_only_loss false" in message
        call(*flags, "--assistant_only_loss", "false")
        assert (tmp_path / "outputs" / "sft-model" / "model.safetensors").is_file()

    def test_conversations_without_an_answer_are_refused_by_trl(self, call, real):
        """Its message names the cause, before it trains."""
        with pytest.raises(RuntimeError, match="at least one example has no assistant tokens"):
            call(*real([{"messages": USER}] * 4))

    def test_a_base_model_that_ends_texts_with_another_token_is_refused_and_two_flags_help(
        self, call, real, refused, own_model, tmp_path
    ):
        """As with Qwen's base models: texts end with one token, which also pads, and the template ends turns with another."""
        import transformers

        for name, values in {
            "tokenizer_config.json": {"eos_token": "<|system|>", "pad_token": "<|system|>"},
            "config.json": {"eos_token_id": 4},
            "generation_config.json": {"eos_token_id": 4},
        }.items():
            path = own_model / name
            path.write_text(json.dumps(json.loads(path.read_text()) | values))
        assert transformers.AutoTokenizer.from_pretrained(own_model).eos_token_id == 4
        flags = real(model=own_model)
        assert "--pad_token" in refused(*flags)
        flags += ["--pad_token", "<|pad|>"]
        message = refused(*flags)
        assert "<|system|>" in message
        assert "--eos_token" in message
        call(*flags, "--eos_token", "<|end|>")
        saved = tmp_path / "outputs" / "sft-model"
        assert transformers.AutoTokenizer.from_pretrained(saved).eos_token == "<|end|>"
        ends = transformers.GenerationConfig.from_pretrained(saved).eos_token_id
        assert 1 in (ends if isinstance(ends, list) else [ends])  # it will stop there

    def test_a_text_beside_prompt_and_completion_is_left_out(self, call, real, capsys):
        """Otherwise TRL puts the end token behind the text, and none behind the answer."""
        call(*real([{"prompt": PROMPT + " ", "completion": RIGHT, "text": PROMPT + RIGHT}] * 8))
        assert re.search(r"^loss .*#19<\|end\|>$", capsys.readouterr().out, re.M)
