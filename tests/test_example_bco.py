"""bco.py: what all scripts are tested for, what it shares with kto.py, and what only this one has to show."""

import sys

import pytest
from examples import EXAMPLES, SHORT, functions, load, logged, losses, write_rows
from test_example_kto import UNPAIRED, Unpaired


class TestBCO(Unpaired):
    name = "bco"
    removed = "1.14"
    at_start = {"loss": (0.6931, 1e-4)}  # log 2: the policy is still the reference
    printed = {
        "prompt_input_ids": r"<\|user\|>[\d+]+<\|end\|><\|assistant\|>",
        "completion_labels": r".*<\|end\|>",
        "label": r"(True|False)",
    }

    def test_it_prepares_its_rows_as_kto_does(self):
        own, other = functions("bco"), functions("kto")
        for function in ("single_answers", "labels_of"):
            assert own[function] == other[function]

    def test_a_batch_of_one_trains(self, call, real, tmp_path):
        call(*real(), "--per_device_train_batch_size", "1")
        assert logged(tmp_path / "outputs" / "bco-qwen3")[1]["loss"] == pytest.approx(0.6931, abs=1e-3)

    def test_a_stream_is_refused(self, real, refused):
        assert "--dataset_streaming" in refused(*real(), "--dataset_streaming")

    def test_answers_that_max_length_would_cut_are_left_out(self, real, call, capsys, tmp_path):
        rows = [UNPAIRED["text"] | {"label": n % 2 == 0} for n in range(8)]
        rows += [row | {"completion": "1+1=2 " * 40 + "#2"} for row in rows[:2]]
        rows += [row | {"prompt": "1+" * 80 + "1 "} for row in rows[:1]]
        call(*real(data=write_rows(tmp_path / "data", rows)), "--max_length", "64")
        assert "3 of 11 rows are longer than max_length=64 tokens and are left out" in capsys.readouterr().out

    def test_no_row_that_is_left_is_longer_than_max_length(self, script, real, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        asked = [[{"role": "user", "content": "1" * n}] for n in range(1, 40)]
        rows = [UNPAIRED["conversational"] | {"label": n % 2 == 0, "prompt": prompt} for n, prompt in enumerate(asked)]
        parsed = script.parse(
            [*map(str, real(data=write_rows(tmp_path / "data", rows))), "--max_length", "30", "--eval_strategy", "no"]
        )
        data = script.load_data(parsed[1], parsed[4])
        tokenizer = script.load_tokenizer(*parsed[1:4], data["train"][0])
        left = script.build(*parsed[1:4], data["train"], None, tokenizer).train_dataset
        lengths = sorted(len(ids) for ids in left["completion_input_ids"])
        assert 0 < len(left) < len(rows) and lengths[-1] == 30

    def test_a_precomputed_reference_is_the_same_one_and_refused_for_a_resumed_run(self, call, refused, tmp_path):
        """BCOTrainer computes it when the training starts: with the weights of the checkpoint, if there is one."""
        flags = [*SHORT, "--save_strategy", "steps", "--save_steps", "1", "--output_dir"]
        call(*flags, "plain")
        call(*flags, "precomputed", "--precompute_ref_log_probs")
        assert losses(tmp_path / "precomputed") == pytest.approx(losses(tmp_path / "plain"), abs=1e-5)
        flags += ["precomputed", "--resume_from_checkpoint", "true"]
        assert "go on without" in refused(*flags, "--precompute_ref_log_probs")
        call(*flags)

    def test_a_newer_trl_is_refused_with_what_to_do(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "trl.experimental.bco", None)  # as if it were not there
        with pytest.raises(SystemExit) as stopped:
            load(EXAMPLES / "bco.py")
        for part in ("removed in TRL 1.14", "uv run bco.py", "pip install 'trl==", "kto.py"):
            assert part in str(stopped.value)
