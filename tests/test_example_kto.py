"""kto.py: what all scripts are tested for, what it shares with bco.py, and what only this one has to show."""

import pytest
from examples import ASSISTANT, MISTAKEN, PREFERENCE, PROMPT, RIGHT, SHORT, USER, Example, logged, write_rows

UNPAIRED = {
    "conversational": {"prompt": USER, "completion": ASSISTANT, "label": True},
    "text": {"prompt": PROMPT + " ", "completion": RIGHT, "label": True},
}


class Unpaired(Example):
    """What kto.py and bco.py share: rows of one answer with a label, or pairs that are taken apart."""

    formats = UNPAIRED | {f"pair, {name}": row for name, row in PREFERENCE.items()}
    needs = ({"prompt", "completion", "label"}, {"chosen", "rejected"})
    flags = ("--max_length", "64")

    @staticmethod
    def row(place, row):
        return row | {"label": place % 2 == 0} if "label" in row else row

    def test_an_adapter_starts_as_the_reference_and_the_same_for_one_seed(self, call, tmp_path):
        flags = ["--use_peft", "--lora_r", "4", "--learning_rate", "1e-2", *SHORT, "--output_dir"]
        for output in ("one", "two"):
            call(*flags, output)
        one, two = logged(tmp_path / "one"), logged(tmp_path / "two")
        assert one[1]["rewards/chosen"] == pytest.approx(0, abs=1e-4)
        assert one[1]["rewards/rejected"] == pytest.approx(0, abs=1e-4)
        assert one[2]["loss"] == two[2]["loss"]

    @pytest.mark.parametrize("label", [True, False])
    def test_labels_of_one_kind_are_refused(self, label, real, refused, tmp_path):
        data = write_rows(tmp_path / "data", [UNPAIRED["conversational"] | {"label": label}] * 8)
        message = refused(*real(data=data))
        assert f"every label in the split 'train' is {str(label).lower()}" in message
        assert ("sft.py" in message) == label  # which would learn the bad answers, if there are no good ones

    @pytest.mark.parametrize("labels", [("good", "bad"), (1, 0), (1, -1), (0.9, 0.2), (True, None)], ids=str)
    def test_labels_that_are_not_booleans_are_refused(self, labels, real, refused, tmp_path):
        rows = [UNPAIRED["conversational"] | {"label": label} for label in labels * 4]
        message = refused(*real(data=write_rows(tmp_path / "data", rows)))
        assert "the split 'train' has" in message
        assert repr(labels[1]) in message
        assert "booleans" in message or labels[1] is None  # a gap is refused before, with its row

    def test_a_held_out_row_without_a_label_is_refused(self, real, refused, tmp_path):
        flags = real()
        write_rows(tmp_path / "other", [UNPAIRED["conversational"] | {"label": label} for label in (True, None)])
        (tmp_path / "other" / "test.jsonl").replace(tmp_path / "data" / "test.jsonl")
        assert "the split 'test' has None" in refused(*flags, "--eval_strategy", "steps")

    def test_pairs_become_good_and_bad_rows_in_mixed_order(self, script):
        from datasets import Dataset

        pairs = Dataset.from_list([PREFERENCE["conversational, implicit prompt"] | {"number": n} for n in range(100)])
        rows = script.single_answers(pairs, seed=1)
        assert rows[0]["prompt"] == USER
        assert {row["completion"][0]["content"]: row["label"] for row in rows} == {
            ASSISTANT[0]["content"]: True,
            MISTAKEN[0]["content"]: False,
        }
        labels = list(rows["label"])
        assert labels.count(True) == labels.count(False) == 100
        assert all(len(set(labels[start : start + 20])) == 2 for start in range(0, 200, 20))  # no batch of one kind

    def test_columns_that_would_mislead_trl_do_no_harm(self, script):
        from datasets import Dataset

        pair = PREFERENCE["conversational, explicit prompt"]
        for more in (
            {"label": False},
            {"completion": MISTAKEN},
        ):  # TRL would give both answers this label, or this text
            rows = script.single_answers(Dataset.from_list([pair | more] * 4), seed=1)
            found = {(row["completion"][0]["content"], row["label"]) for row in rows}
            assert found == {(ASSISTANT[0]["content"], True), (MISTAKEN[0]["content"], False)}
        single = UNPAIRED["conversational"]
        beside = {"chosen": ASSISTANT, "rejected": MISTAKEN, "messages": USER + ASSISTANT, "number": 1}
        for names in (("chosen",), ("chosen", "rejected"), ("messages", "number")):
            rows = script.single_answers(
                Dataset.from_list([single | {name: beside[name] for name in names}] * 4), seed=1
            )
            assert len(rows) == 4 and set(rows.column_names) == {*single, *({"number"} & set(names))}

    def test_a_stream_of_pairs_is_mixed(self, script):
        from datasets import Dataset

        pairs = Dataset.from_list([PREFERENCE["text, explicit prompt"]] * 1000).to_iterable_dataset()
        labels = [row["label"] for row in script.single_answers(pairs, seed=1)]
        shares = [sum(labels[start : start + 200]) / 200 for start in range(0, 2000, 200)]
        assert len(labels) == 2000 and min(shares) > 0.3 and max(shares) < 0.7

    def test_the_seed_decides_the_order(self, script):
        from datasets import Dataset

        rows = Dataset.from_list([UNPAIRED["text"] | {"number": n} for n in range(100)])
        one, same, other = (list(script.single_answers(rows, seed)["number"]) for seed in (1, 1, 2))
        assert one == same
        assert one != other
        assert sorted(one) == list(range(100))

    def test_the_default_data_set_of_a_real_run_needs_no_mapping(self, script, call, real, tmp_path):
        """Rows as in trl-lib/kto-mix-14k: messages, also of several turns, and a boolean."""
        assert script.REAL["dataset_name"] == "trl-lib/kto-mix-14k"
        turns = [
            {"content": "1+1", "role": "user"},
            {"content": "1+1=2 #2", "role": "assistant"},
            {"content": "2+2", "role": "user"},
        ]
        rows = [
            {"prompt": turns[:1], "completion": [turns[1]], "label": True},
            {"prompt": turns, "completion": [{"content": "2+2=4 #4", "role": "assistant"}], "label": True},
            {"prompt": turns, "completion": [{"content": "2+2=5 #5", "role": "assistant"}], "label": False},
        ]
        call(*real(data=write_rows(tmp_path / "data", rows)))
        assert set(logged(tmp_path / "outputs" / f"{self.name}-qwen3")) == {1}

    def test_a_max_length_that_cuts_every_row_is_refused(self, real, refused):
        flags = real()
        for length in ("20", "4"):  # the answers are cut; then the prompt alone does not fit
            assert f"max_length={length}" in refused(*flags, "--max_length", length)


class TestKTO(Unpaired):
    name = "kto"
    at_start = {"loss": (0.6475, 1e-4), "rewards/margins": (0, 1e-4)}  # half of the mean weight; still the reference
    printed = {
        "prompt_ids": r"<\|user\|>[\d+]+<\|end\|><\|assistant\|>",
        "completion_ids": r".*<\|end\|>",
        "KL_completion_ids": r".*<\|end\|>",
        "label": r"(True|False)",
    }

    def test_kl_is_measured_on_the_answers_of_the_same_batch(self, script, tmp_path, monkeypatch):
        """Each row gets the answer of the row before it, and the first of a batch that of the last."""
        monkeypatch.chdir(tmp_path)
        parsed = script.parse(["--per_device_train_batch_size", "4", "--output_dir", "run"])
        data = script.load_data(parsed[1], parsed[4])
        tokenizer = script.load_tokenizer(*parsed[1:4], data["train"][0])
        rows = script.build(*parsed[1:4], data["train"], None, tokenizer).train_dataset
        for start in (0, 4):
            answers = rows[start : start + 4]["completion_ids"]
            assert rows[start : start + 4]["KL_completion_ids"] == answers[-1:] + answers[:-1]

    def test_a_batch_of_one_is_refused(self, call, real, tmp_path):
        """TRL's own message."""
        with pytest.raises(ValueError, match="batch size must be > 1"):
            call(*real(), "--per_device_train_batch_size", "1")
        assert not [path for path in (tmp_path / "outputs").rglob("*") if path.is_file()]

    def test_held_out_rows_are_grouped_for_kl_as_they_are_evaluated(self, script):
        for settings in (script.TOY, script.REAL):
            assert settings["per_device_eval_batch_size"] == settings["per_device_train_batch_size"]

    def test_rows_that_trl_drops_are_counted(self, call, real, capsys):
        long = {"prompt": [{"role": "user", "content": "1+" * 40 + "1"}]}
        rows = [UNPAIRED["conversational"] | (long if n < 4 else {}) for n in range(8)]
        call(*real(rows))
        assert "4 of 8 rows have a prompt that fills max_length=64 and are left out" in capsys.readouterr().out

    def test_the_weights_of_the_toy_balance_its_labels(self, bare):
        """TRL warns where they do not."""
        assert "desirable_weight in [" not in bare[1].stderr

    def test_it_trains_on_a_stream(self, call, real, tmp_path):
        call(*real(), "--dataset_streaming")
        assert set(logged(tmp_path / "outputs" / "kto-qwen3")) == {1}
