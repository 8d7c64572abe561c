"""cpo.py: what all scripts are tested for, what it shares with orpo.py, and what only this one has to show."""

import json
import math

import pytest
from examples import ASSISTANT, MISTAKEN, PREFERENCE, PROMPT, RIGHT, SHORT, TOY, Example, functions, logged

# A pair that TRL 1.12 cuts down to no chosen answer at all with a max_length of 64: the other answer alone is longer.
LOPSIDED = {"prompt": PROMPT + " ", "chosen": "#1", "rejected": " ".join([RIGHT] * 5)}


def by_hand(figure, size: int = 8):
    """The mean of a figure over the batches of the test split, as the toy policy gives it, and the pairs of that split.

    A pair is three tensors with the log-probabilities of its prompt's tokens, its chosen answer's and its rejected
    answer's; `figure` takes a batch of them.
    """
    import torch
    import transformers
    from datasets import load_dataset

    tokenizer = transformers.AutoTokenizer.from_pretrained(TOY / "policy")
    model = transformers.AutoModelForCausalLM.from_pretrained(TOY / "policy")

    @torch.no_grad()
    def log_probabilities(row, answer):
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
        whole = tokenizer.apply_chat_template(row["prompt"] + row[answer], return_dict=True)["input_ids"]
        scores = model(torch.tensor([whole])).logits[0, :-1].log_softmax(-1)
        found = scores.gather(-1, torch.tensor(whole)[1:, None])[:, 0]
        return found[: len(prompt) - 1], found[len(prompt) - 1 :]

    pairs = []
    for row in load_dataset(str(TOY / "data" / "preference"), split="test"):
        prompt, chosen = log_probabilities(row, "chosen")
        pairs.append((prompt, chosen, log_probabilities(row, "rejected")[1]))
    assert len(pairs) % size == 0
    figures = [figure(pairs[start : start + size]) for start in range(0, len(pairs), size)]
    return sum(figures) / len(figures), pairs


class Pairs(Example):
    """What cpo.py and orpo.py share: pairs, one model, and TRL's old way to tokenize."""

    formats = PREFERENCE
    needs = ({"chosen", "rejected"},)
    flags = ("--max_length", "64")

    @pytest.fixture
    def trainer(self, script, real):
        """A function that builds the script's trainer for rows of our own, without a run."""
        from datasets import Dataset

        def build(rows, *flags):
            parsed = script.parse([*map(str, real(rows)), *flags])
            data = Dataset.from_list(rows)
            return script.build(*parsed[1:4], data, data, script.load_tokenizer(*parsed[1:4], rows[0]))

        return build

    def test_what_both_scripts_share_is_the_same(self):
        cpo, orpo = functions("cpo"), functions("orpo")
        assert cpo["whole_pairs"] == orpo["whole_pairs"]
        assert cpo["only_pairs"] == orpo["only_pairs"]
        own = cpo["build"].replace("    check_alpha(training_args)\n", "")
        assert own.replace("CPO", "ORPO") == orpo["build"].replace("FiniteORPO", "ORPO")

    def test_columns_that_trl_stumbles_over_do_no_harm(self, script):
        from datasets import Dataset

        pair = PREFERENCE["conversational, explicit prompt"]
        rows = script.only_pairs(Dataset.from_list([pair | {"label": True, "chosen_logps": 1.0}] * 2))
        assert rows.column_names == ["prompt", "chosen", "rejected"]
        rows = script.only_pairs(Dataset.from_list([PREFERENCE["text, implicit prompt"] | {"label": True}] * 2))
        assert rows.column_names == ["chosen", "rejected"]

    def test_one_model_is_held(self, trainer):
        built = trainer([PREFERENCE["text, explicit prompt"]] * 2)
        assert getattr(built, "ref_model", None) is None

    def test_an_adapter_depends_on_the_seed_alone(self, call, tmp_path):
        for output in ("one", "two"):
            call("--use_peft", "--lora_r", "4", "--learning_rate", "1e-3", *SHORT, "--output_dir", output)
        one, two = logged(tmp_path / "one"), logged(tmp_path / "two")
        for step in (1, 2):
            assert one[step]["loss"] == two[step]["loss"]
            assert one[step]["grad_norm"] == two[step]["grad_norm"]

    # -- pairs that are too long -----------------------------------------------------------------------------------------

    def test_a_max_length_that_cuts_every_pair_is_refused(self, real, refused):
        flags = real()
        for length in ("20", "4"):  # the answers are cut; then the prompt alone does not fit
            assert f"max_length={length}" in refused(*flags, "--max_length", length)

    def test_a_test_split_of_long_pairs_is_refused(self, real, refused, tmp_path):
        flags = real([PREFERENCE["text, explicit prompt"]] * 4)
        (tmp_path / "data" / "test.jsonl").write_text(json.dumps(LOPSIDED) + "\n")
        assert "every pair is longer than max_length=64" in refused(*flags)

    @pytest.mark.parametrize("answers", [("chosen", "rejected"), ("rejected", "chosen")])
    def test_a_pair_with_one_long_answer_is_left_out_and_does_no_harm(self, answers, call, real, tmp_path, capsys):
        lopsided = LOPSIDED | dict(zip(answers, (LOPSIDED["chosen"], LOPSIDED["rejected"]), strict=True))
        call(*real([lopsided] + [PREFERENCE["text, explicit prompt"]] * 7))
        assert capsys.readouterr().out.count("1 of 8 pairs are longer than max_length=64 tokens and are left out") == 2
        held_out = json.loads((tmp_path / "outputs" / f"{self.name}-qwen3" / "held_out.json").read_text())
        for figures in (held_out["before"], held_out["after"]):
            assert all(math.isfinite(value) for value in figures.values())

    def test_a_long_prompt_is_left_out_whole(self, trainer):
        """TRL never cuts a prompt, so this pair would be longer than max_length in the batch."""
        row = PREFERENCE["text, explicit prompt"]
        built = trainer([row, row | {"prompt": PROMPT * 20 + " "}])
        assert len(built.train_dataset) == len(built.eval_dataset) == 1

    def test_nothing_is_left_out_of_the_toy_world(self, bare):
        assert "left out" not in bare[1].stdout

    def test_max_completion_length_is_refused(self, real, refused):
        """TRL reads it for encoder-decoder models and says nothing to the others."""
        flags = real()
        for length in ("0", "10"):
            message = refused(*flags, "--max_completion_length", length)
            assert "max_completion_length" in message
            assert "--max_length" in message

    # -- other bad input, and surprises ----------------------------------------------------------------------------------

    @pytest.mark.parametrize("row", PREFERENCE.values(), ids=PREFERENCE)
    def test_pairs_of_equal_answers_are_refused(self, row, real, refused):
        message = refused(*real([row | {"rejected": row["chosen"]}] * 4))
        assert "chosen and rejected are the same in each of the first 4 pairs" in message

    def test_one_pair_of_equal_answers_among_others_trains(self, call, real, tmp_path):
        row = PREFERENCE["text, explicit prompt"]
        call(*real([row | {"rejected": row["chosen"]}] + [row] * 7))
        assert set(logged(tmp_path / "outputs" / f"{self.name}-qwen3")) == {1}

    def test_a_stream_is_refused(self, real, refused):
        assert "--dataset_streaming" in refused(*real(), "--dataset_streaming")

    def test_a_template_that_writes_on_behind_the_end_gets_a_second_end(self, trainer, real, script, own_model, capsys):
        """As Qwen's does. The printed row shows it."""
        path = own_model / "chat_template.jinja"
        path.write_text(path.read_text().replace("<|end|>", "<|end|>\n"))
        row = PREFERENCE["conversational, explicit prompt"]
        built = trainer([row] * 2, "--model_name_or_path", str(own_model))
        script.show_row(built)
        printed = capsys.readouterr().out
        for answer in (ASSISTANT, MISTAKEN):
            assert answer[0]["content"] + "<|end|>\n<|end|>" in printed
        ends = [
            token for token in built.train_dataset[0]["chosen_labels"] if token == built.processing_class.eos_token_id
        ]
        assert len(ends) == 2


class TestCPO(Pairs):
    name = "cpo"
    least = 0.95
    printed = {
        "prompt_input_ids": r"<\|user\|>[\d+]+<\|end\|><\|assistant\|>",
        "chosen_labels": r"[\d+= ]+ #\d+<\|end\|>",
        "rejected_labels": r"\d.*<\|end\|>",
    }

    def test_alpha_with_sums_is_refused(self, real, refused):
        assert "--loss_type simpo" in refused(*real(), "--alpha", "0.5")

    def test_the_first_figures_are_those_of_the_formula(self, bare, script):
        """Computed by hand: 0.1 is TRL's beta, sums over tokens in the first term, a mean over tokens in the second."""
        import torch

        def nll(batch):
            return -torch.cat([chosen for _, chosen, _ in batch]).mean().item()

        def loss(batch):
            margins = torch.stack([chosen.sum() - rejected.sum() for _, chosen, rejected in batch])
            return -(0.1 * margins).sigmoid().log().mean().item() + script.TOY["cpo_alpha"] * nll(batch)

        before = json.loads((bare[0] / "held_out.json").read_text())["before"]
        expected, pairs = by_hand(loss)
        assert before["loss"] == pytest.approx(expected, abs=1e-4)
        assert before["nll_loss"] == pytest.approx(by_hand(nll)[0], abs=1e-5)
        right = [(chosen.sum() > rejected.sum()).item() for _, chosen, rejected in pairs]
        assert before["rewards/accuracies"] == pytest.approx(sum(right) / len(right), abs=1e-6)

    @pytest.mark.parametrize(
        ("flags", "loss"),
        [
            ((), math.log(2)),
            (("--loss_type", "hinge"), 1.0),  # max(0, 1 - 0)
            (("--loss_type", "ipo"), 25.0),  # (0 - 1 / (2 * 0.1))^2
            (("--loss_type", "simpo", "--beta", "2", "--simpo_gamma", "1"), math.log(1 + math.e)),
            (("--loss_type", "alphapo", "--beta", "2", "--simpo_gamma", "1"), math.log(1 + math.e)),
        ],
        ids=["sigmoid", "hinge", "ipo", "simpo", "alphapo"],
    )
    def test_what_a_pair_of_equal_answers_costs(self, flags, loss, trainer):
        row = PREFERENCE["text, explicit prompt"]
        metrics = trainer([row | {"rejected": RIGHT}] * 2, "--cpo_alpha", "0", *flags).evaluate()
        assert metrics["eval_loss"] == pytest.approx(loss, abs=1e-4)
        assert metrics["eval_rewards/accuracies"] == 0  # equal is not greater
        assert metrics["eval_rewards/margins"] == 0

    def test_the_flags_of_simpo_in_the_docstring_work(self, script, call, tmp_path):
        [flags] = [line.split("cpo.py ")[1] for line in script.__doc__.splitlines() if "--loss_type simpo" in line]
        call(*flags.split(), *SHORT, "--output_dir", "simpo")
        for row in logged(tmp_path / "simpo").values():
            assert row["nll_loss"] == 0
            assert row["logps/chosen"] > -0.1  # means over the tokens

    def test_what_a_row_says_to_its_template_is_kept(self, script):
        from datasets import Dataset

        row = {"prompt": "7+9", "chosen": "16", "rejected": "17", "label": True}
        kept = script.only_pairs(Dataset.from_list([row | {"chat_template_kwargs": {"enable_thinking": False}}]))
        assert set(kept.column_names) == {"prompt", "chosen", "rejected", "chat_template_kwargs"}
