"""gkd.py: what all scripts are tested for, and what only this one has to show."""

import json
import re
import shutil

import pytest
from examples import ASSISTANT, PROMPT, RIGHT, SHORT, TOY, USER, Example, losses

TURNS = USER + ASSISTANT + [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "1+1=2 #2"}]
TEACHER = "--teacher_model_name_or_path"


def with_loss(text: str) -> list[str]:
    """The stretches of the printed row that carry loss."""
    return re.findall(r"^loss +(.*)$", text.split("\n{")[0], re.M)


@pytest.fixture
def own_teacher(tmp_path):
    """The toy's teacher in a folder whose files a test may change."""
    return shutil.copytree(TOY / "teacher", tmp_path / "teacher")


class TestGKD(Example):
    name = "gkd"
    formats = {
        "conversation": {"messages": USER + ASSISTANT},
        "conversational prompt and completion": {"prompt": USER, "completion": ASSISTANT},
    }
    needs = ({"messages"}, {"prompt", "completion"})
    at_start = {"loss": (0.0041, 1e-4)}  # how far the base is from its teacher, in nats per token
    least = 0.95
    printed = {
        "no loss": r"<\|user\|>[\d+]+<\|end\|><\|assistant\|>",
        "loss": r"[\d+= ]+ #\d+<\|end\|>",
    }
    flags = (TEACHER, str(TOY / "teacher"), "--max_length", "64", "--max_new_tokens", "8")

    # -- what is compared ------------------------------------------------------------------------------------------------

    def test_only_the_last_answer_carries_loss(self, call, real, capsys):
        call(*real([{"messages": TURNS}] * 4))
        assert with_loss(capsys.readouterr().out) == ["1+1=2 #2<|end|>"]

    @pytest.mark.parametrize(
        "others",
        [
            {"source": "Airoboros", "num_turns": 1},  # trl-lib/Capybara, the default
            {"prompt": PROMPT, "prompt_id": "f0e37e9f"},  # HuggingFaceH4/ultrachat_200k: TRL would take that prompt
        ],
        ids=["Capybara", "ultrachat"],
    )
    def test_conversations_with_more_columns(self, others, call, real, capsys):
        call(*real([{"messages": USER + ASSISTANT} | others] * 4))
        assert with_loss(capsys.readouterr().out) == [RIGHT + "<|end|>"]

    def test_only_its_own_answers_count_at_lmbda_1_and_only_the_datas_at_0(self, call, real, tmp_path):
        """The loss is a mean over the tokens that are compared, however long the data's answers are."""
        short = [{"messages": [*USER, {"role": "assistant", "content": "#19"}]}] * 8
        flags = real([self.formats["conversation"]] * 8)
        found = {}
        for answers in ("long", "short"):
            for lmbda in ("0", "1"):
                output = f"{answers}-{lmbda}"
                call(*flags, "--lmbda", lmbda, "--output_dir", output)
                found[output] = losses(tmp_path / output)[1]
            for split in ("train", "test"):
                (tmp_path / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in short))
        assert found["short-1"] == found["long-1"]
        assert found["short-0"] != found["long-0"]

    def test_long_conversations_and_those_without_an_answer_are_left_out_and_counted(self, call, real, capsys):
        long = {"messages": [*USER, {"role": "assistant", "content": RIGHT * 5}]}
        alone = {"messages": [{"role": "assistant", "content": RIGHT}]}
        rows = [self.formats["conversation"], long, {"messages": USER}, {"messages": TURNS}, alone, {"messages": []}]
        call(*real(rows))
        assert "4 of 6 conversations are left out: they have more than max_length=64" in capsys.readouterr().out

    # -- the teacher -----------------------------------------------------------------------------------------------------

    def test_a_teacher_with_a_wider_matrix_teaches_the_same(self, call, real, own_teacher, tmp_path):
        """As in Qwen2.5, where 0.5B has 151936 rows and 7B has 152064 for the same tokens."""
        import transformers

        flags = [*real(), "--lmbda", "0"]
        call(*flags, "--output_dir", "same")
        model = transformers.AutoModelForCausalLM.from_pretrained(own_teacher)
        model.resize_token_embeddings(320)
        model.save_pretrained(own_teacher)
        call(*flags, TEACHER, own_teacher, "--output_dir", "wider")
        assert losses(tmp_path / "wider") == losses(tmp_path / "same")

    def test_a_teacher_with_a_narrower_matrix_is_refused_by_trl(self, call, real, own_model, tmp_path):
        """Its message names both sizes, before it trains."""
        import transformers

        model = transformers.AutoModelForCausalLM.from_pretrained(own_model)
        model.resize_token_embeddings(320)
        model.save_pretrained(own_model)
        with pytest.raises(ValueError, match="vocab_size 320 but the teacher model has vocab_size 261"):
            call(*real(model=own_model))
        assert not list((tmp_path / "outputs").rglob("*.*"))

    def test_a_run_without_a_teacher_is_refused(self, tiny_models, real, refused):
        flags = list(map(str, real()))
        where = flags.index(TEACHER)
        assert TEACHER in refused(*flags[:where], *flags[where + 2 :])

    @pytest.mark.parametrize("teacher", ["./no/such/teacher", "nobody/no-such-teacher"])
    def test_a_teacher_that_is_nowhere_is_refused(self, teacher, real, refused):
        message = refused(*real(), TEACHER, teacher)
        assert f"cannot load the teacher '{teacher}'" in message
        assert "neither a model folder here nor on the hub" in message

    def test_a_teacher_with_another_vocabulary_is_refused(self, real, refused, own_teacher):
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(own_teacher)
        tokenizer.add_tokens(["<|think|>"])
        tokenizer.save_pretrained(own_teacher)
        message = refused(*real(), TEACHER, own_teacher)
        assert "another vocabulary" in message
        assert "1 tokens differ, for example ['<|think|>']" in message

    # -- bad input -------------------------------------------------------------------------------------------------------

    def test_plain_text_is_refused(self, real, refused):
        message = refused(*real([{"prompt": PROMPT, "completion": RIGHT}] * 4))
        assert "lists of messages" in message

    def test_a_max_length_that_no_conversation_fits_into_is_refused(self, real, refused):
        assert "max_length=20" in refused(*real(), "--max_length", "20")

    def test_the_template_of_another_model_is_refused(self, real, refused):
        assert "has to be a .jinja file" in refused(*real(), "--chat_template_path", TOY / "teacher")

    def test_packing_is_refused_by_trl(self, call):
        """Its message is about the collator; nothing is trained."""
        with pytest.raises(ValueError, match="custom data collator is not supported when using padding-free"):
            call(*SHORT, "--packing")
