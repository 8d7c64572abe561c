"""prm.py: what all scripts are tested for, and what only this one has to show."""

import json
import math
import shutil
import sys

import pytest
from examples import (
    ASSISTANT,
    EXAMPLES,
    PROMPT,
    SHORT,
    TOY,
    USER,
    Example,
    functions,
    load,
    logged,
    losses,
    write_rows,
)

STEPS = ["7+9=16", "16+3=20", "#20"]
ROW = {"prompt": PROMPT + " ", "completions": STEPS, "labels": [True, False, False]}
MATH_SHEPHERD = [  # rows in the schema of trl-lib/math_shepherd
    {
        "prompt": "Tim has 7 pens and buys 9. Then he finds 3. How many pens does he have?",
        "completions": ["Step 1: 7 + 9 = 16 pens.", "Step 2: 16 + 3 = 19 pens. The answer is: 19"],
        "labels": [True, True],
    },
    {
        "prompt": "Ann reads 4 pages a day. How many in 5 days?",
        "completions": ["Step 1: She reads 4 * 5 = 9 pages. The answer is: 9"],
        "labels": [False],
    },
    {"prompt": "What is half of 10?", "completions": [], "labels": []},
]


class TestPRM(Example):
    name = "prm"
    formats = {"text": ROW}
    needs = ({"prompt", "completions", "labels"},)
    removed = "1.14"
    figure = "first error found"
    gain = 0.15
    least = 0.95
    printed = {
        "input_ids": r"<\|system\|>mark<\|end\|><\|user\|>[\d+]+<\|end\|><\|assistant\|>[\d+= ]+ #\d+ ",
        "labels": r"<\|system\|>mark<\|end\|><\|user\|>[\d+]+<\|end\|><\|assistant\|>\d\+\d=\d+ \[[01]\] \| .* \| #\d+ \[[01]\]",
    }
    flags = ("--step_separator", " ")

    @pytest.fixture
    def trainer(self, script, real):
        """A function that builds the script's trainer for rows of our own, without a run."""
        from datasets import Dataset

        def build(rows, *flags):
            parsed = script.parse([*map(str, real(rows)), *flags])
            data = Dataset.from_list(rows)
            return script.build(*parsed[1:4], data, data, script.load_tokenizer(*parsed[1:4], rows[0]))

        return build

    # -- what the bare run has trained -----------------------------------------------------------------------------------

    def test_both_figures_reach_the_bar_in_every_seed(self, bare, expected):
        held_out = json.loads((bare[0] / "held_out.json").read_text())
        for figure in ("step accuracy", "first error found"):
            assert held_out["after"][figure] >= 0.95
            assert min(expected["held_out"][figure]["after"]) >= 0.95

    def test_the_saved_model_alone_gives_the_figures_without_the_prefix(self, bare):
        """Opened without TRL, one answer at a time, with the steps put together by hand."""
        import torch
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(bare[0])
        model = transformers.AutoModelForTokenClassification.from_pretrained(bare[0])
        assert model.config.id2label == {0: "wrong", 1: "right"}
        right = steps = found = 0
        rows = [json.loads(line) for line in (TOY / "data/stepwise_supervision/test.jsonl").read_text().splitlines()]
        for row in rows:
            ids, places = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"], []
            for step in row["completions"]:
                ids += tokenizer(step + " ", add_special_tokens=False)["input_ids"]
                places.append(len(ids) - 1)
            with torch.no_grad():
                guesses = model(input_ids=torch.tensor([ids])).logits[0, places].argmax(-1).bool().tolist()
            right += sum(guess == label for guess, label in zip(guesses, row["labels"], strict=True))
            steps += len(places)
            found += [*guesses, False].index(False) == [*row["labels"], False].index(False)
        after = json.loads((bare[0] / "held_out.json").read_text())["after"]
        assert right / steps == pytest.approx(after["step accuracy"], abs=1e-3)
        assert found / len(rows) == pytest.approx(after["first error found"], abs=6e-3)  # one answer is 0.005

    def test_each_step_is_shown_with_its_probability(self, bare):
        _, done = bare
        rows = [json.loads(line) for line in (TOY / "data/stepwise_supervision/test.jsonl").read_text().splitlines()]
        for row in [row for row in rows if not all(row["labels"])][:3]:
            steps = zip(row["completions"], row["labels"], strict=True)
            shown = row["prompt"] + " | ".join(f"{step} [{int(label)}]" for step, label in steps)
            _, _, after = done.stdout.partition(f"\n  {shown}\n    before: ")
            for line in after.splitlines()[:2]:
                chances = line.removeprefix("    after:  ").split(" | ")
                assert len(chances) == len(row["labels"])
                assert all(0 <= float(chance) <= 1 for chance in chances)

    # -- the two remedies of the toy, and a plain run --------------------------------------------------------------------

    def test_a_real_run_is_a_plain_one(self, script, trainer):
        _, script_args, training_args, *_ = script.parse(["--model_name_or_path", "some/model", "--use_cpu"])
        assert (script_args.new_layers, script_args.prompt_prefix, script_args.new_learning_rate) == (0, None, None)
        assert training_args.step_separator == "\n"
        built = trainer([ROW] * 4)
        assert built.model.config.num_hidden_layers == 2
        assert built.optimizer is None  # Trainer makes it
        assert {built.processing_class.decode(row["input_ids"]) for row in built.train_dataset} == {
            f"{PROMPT} {' '.join(STEPS)} "
        }

    def test_every_second_training_prompt_gets_the_prefix(self, trainer):
        built = trainer([ROW] * 4, "--prompt_prefix", "mark ")
        marked = [built.processing_class.decode(row["input_ids"]).startswith("mark ") for row in built.train_dataset]
        assert marked == [True, False, True, False]
        assert not any("mark" in built.processing_class.decode(row["input_ids"]) for row in built.eval_dataset)

    def test_new_weights_have_a_learning_rate_of_their_own(self, trainer):
        rates = ("--learning_rate", "1e-4", "--new_layers", "1", "--new_learning_rate", "1e-2")
        built = trainer([ROW] * 2, *rates)
        names = {id(weight): name for name, weight in built.model.named_parameters()}
        slow, fast = built.optimizer.param_groups
        assert (slow["lr"], fast["lr"]) == (1e-4, 1e-2)
        new = {name for name in names.values() if name.startswith(("score.", "model.layers.2."))}
        assert {names[id(weight)] for weight in fast["params"]} == new
        assert len(slow["params"]) + len(fast["params"]) == len(names)

    def test_what_it_shares_with_reward_is_the_same(self):
        own, other = functions("prm"), functions("reward")
        for function in ("deeper", "two_speeds"):
            assert own[function] == other[function]

    def test_it_goes_on_from_the_folders_of_sft_and_reward(self, call, tmp_path):
        """The reward model's head gives one number without a bias, and is replaced."""
        for script, source in (("sft", "policy"), ("reward", "reward_model")):
            folder = shutil.copytree(TOY / source, tmp_path / "outputs" / f"{script}-toy")
            (folder / "run.json").write_text(json.dumps({"script": script, "toy": True}))
            call("--model_name_or_path", folder, *SHORT)
            config = json.loads((tmp_path / "outputs" / "prm-toy" / "config.json").read_text())
            assert config["num_hidden_layers"] == 5
            assert config["architectures"] == ["Qwen3ForTokenClassification"]

    def test_an_adapter_on_all_linear_layers_leaves_the_head_whole(self, call, real, tmp_path):
        """As recipes/lora_4bit.yaml asks for it. PEFT spares the head of a causal model by itself, and not this one."""
        import peft

        call(*real(), "--use_peft", "--lora_target_modules", "all-linear", "--output_dir", "lora")
        names = sorted(peft.load_peft_weights(str(tmp_path / "lora")))
        assert any("down_proj.lora_A" in name for name in names)
        assert [name for name in names if "score" in name] == [
            "base_model.model.score.bias",
            "base_model.model.score.weight",
        ]

    def test_an_adapter_trains_the_head_and_loads(self, call, tmp_path):
        """With TRL's default task type, CAUSAL_LM, PEFT asks for a method that this model does not have."""
        import peft
        import torch

        call("--use_peft", "--lora_r", "4", "--learning_rate", "1e-3", *SHORT, "--output_dir", "lora")
        size = {"num_labels": 2, "num_hidden_layers": 5, "layer_types": ["full_attention"] * 5}
        loaded = peft.AutoPeftModelForTokenClassification.from_pretrained(tmp_path / "lora", **size).merge_and_unload()
        saved = peft.load_peft_weights(str(tmp_path / "lora"))
        for part in ("score.weight", "score.bias", "layers.4.mlp.up_proj.weight"):
            [tensor] = [tensor for name, tensor in saved.items() if name.endswith(part)]
            assert torch.equal(loaded.get_parameter(part if part[0] == "s" else f"model.{part}"), tensor)
        assert saved[next(name for name in saved if name.endswith("score.bias"))].abs().max() > 0  # 0 at the start

    # -- the loss --------------------------------------------------------------------------------------------------------

    def test_the_label_stands_at_the_last_token_of_the_separator(self, trainer):
        built = trainer([ROW] * 2, "--step_separator", " ;")
        decode, row = built.processing_class.decode, built.train_dataset[0]
        ends = [place for place, label in enumerate(row["labels"]) if label != -100]
        assert [row["labels"][place] for place in ends] == [1, 0, 0]
        assert [decode(row["input_ids"][: place + 1]) for place in ends] == [
            f"{PROMPT} " + "".join(f"{step} ;" for step in STEPS[: count + 1]) for count in range(3)
        ]

    def test_the_loss_is_the_mean_over_the_steps_of_a_batch(self, trainer):
        import torch

        built = trainer([ROW] * 2)
        row = built.train_dataset[0]
        with torch.no_grad():
            chances = built.model.eval()(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        steps = [-chances[place, label].item() for place, label in enumerate(row["labels"]) if label != -100]
        assert len(steps) == 3
        assert built.evaluate()["eval_loss"] == pytest.approx(sum(steps) / 3, abs=1e-5)

    def test_accumulated_gradients_are_those_of_one_batch(self, call, real, tmp_path):
        """Trainer alone would add four means up: loss and gradient would be four times as large."""
        flags = real([ROW] * 8)
        for size, times in (("4", "1"), ("1", "4")):
            sizes = ("--per_device_train_batch_size", size, "--gradient_accumulation_steps", times)
            call(*flags, *sizes, "--output_dir", f"{size}x{times}")
        one, four = (logged(tmp_path / output)[1] for output in ("4x1", "1x4"))
        for key in ("loss", "grad_norm"):
            assert one[key] == pytest.approx(four[key], rel=1e-3)

    # -- rows that lose steps --------------------------------------------------------------------------------------------

    def test_rows_without_a_whole_step_are_left_out_and_do_no_harm(self, call, real, tmp_path, capsys):
        """A batch of such rows alone has nan for its loss, and so would have the held-out rows."""
        rows = [ROW | {"prompt": "1+" * 60}, ROW | {"completions": [], "labels": []}] * 4 + [ROW] * 2
        sizes = ("--per_device_train_batch_size", "1", "--per_device_eval_batch_size", "1")
        call(*real(rows), "--max_length", "40", "--max_steps", "5", *sizes)
        assert capsys.readouterr().out.count("8 of 10 rows have no whole step") == 2
        output = tmp_path / "outputs" / "prm-qwen3"
        assert all(loss > 0 for loss in losses(output).values())  # Trainer's log shows 0 for nan
        held_out = json.loads((output / "held_out.json").read_text())
        assert all(math.isfinite(figures["loss"]) for figures in (held_out["before"], held_out["after"]))

    def test_rows_that_lose_their_last_steps_stay_and_are_counted(self, trainer, script, capsys):
        built = trainer([ROW] * 3 + [ROW | {"prompt": "7 "}], "--max_length", "22")
        script.show_row(built)
        assert "3 of the first 4 rows lose their last steps to max_length=22" in capsys.readouterr().out
        assert [label for label in built.train_dataset[0]["labels"] if label != -100] == [1, 0]

    def test_the_default_data_set_of_a_real_run_needs_no_mapping(self, script, call, real, tmp_path, capsys):
        assert script.REAL["dataset_name"] == "trl-lib/math_shepherd"
        call(*real(MATH_SHEPHERD), "--step_separator", "\n")
        assert set(logged(tmp_path / "outputs" / "prm-qwen3")) == {1}
        printed = capsys.readouterr().out
        assert "1 of 3 rows have no whole step" in printed
        assert "\nlabels       Tim has 7 pens" in printed
        assert "have?Step 1: 7 + 9 = 16 pens. [1] | Step 2: 16 + 3 = 19 pens. The answer is: 19 [1]\n" in printed

    # -- bad input -------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("labels", [[True, False], [True] * 4, None], ids=["one less", "one more", "none"])
    def test_a_step_without_a_label_is_refused(self, labels, real, refused):
        message = refused(*real([ROW] * 3 + [ROW | {"labels": labels}]))
        assert "row 3 of the split 'train'" in message
        if labels is None:
            assert "None in the column 'labels'" in message
        else:
            assert "each step needs a label" in message and repr(STEPS) in message

    def test_a_held_out_step_without_a_label_is_refused(self, real, refused, tmp_path):
        flags = real()
        write_rows(tmp_path / "other", [ROW | {"labels": [True]}])
        (tmp_path / "other" / "test.jsonl").replace(tmp_path / "data" / "test.jsonl")
        assert "row 0 of the split 'test'" in refused(*flags)

    @pytest.mark.parametrize("label", [True, False])
    def test_labels_of_one_kind_are_refused(self, label, real, refused):
        message = refused(*real([ROW | {"labels": [label] * 3}] * 4))
        assert f"every label in the split 'train' is {str(label).lower()}" in message

    @pytest.mark.parametrize(
        "labels", [["+", "-", "-"], [1, -1, -1], [0.9, 0.2, 0.1], [2, 0, 1], [True, None, False]], ids=str
    )
    def test_labels_that_are_not_booleans_are_refused(self, labels, real, refused):
        wrong = next(label for label in labels if label not in (0, 1))
        message = refused(*real([ROW | {"labels": labels}] * 4))
        assert "a label is true or false, and row 0 of the split 'train'" in message
        assert repr(wrong) in message

    @pytest.mark.parametrize("messages", [{"prompt": USER}, {"completions": [ASSISTANT] * 3}], ids=["prompt", "steps"])
    def test_messages_are_refused(self, messages, real, refused):
        message = refused(*real([ROW | messages] * 4))
        assert "prompt and steps are text" in message and "chat template" in message

    def test_held_out_labels_of_one_kind_are_no_fault(self, call, real, tmp_path):
        flags = real([ROW] * 8)
        write_rows(tmp_path / "other", [ROW | {"labels": [True] * 3}] * 2)
        (tmp_path / "other" / "test.jsonl").replace(tmp_path / "data" / "test.jsonl")
        call(*flags)
        assert set(logged(tmp_path / "outputs" / "prm-qwen3")) == {1}

    def test_a_label_of_minus_100_takes_its_step_out_of_the_loss(self, trainer):
        built = trainer([ROW | {"labels": [1, -100, 0]}] * 4)
        assert [label for label in built.train_dataset[0]["labels"] if label != -100] == [1, 0]

    def test_ones_and_zeros_are_labels(self, call, real, tmp_path):
        call(*real([ROW | {"labels": [1, 0, 0]}] * 8))
        assert set(logged(tmp_path / "outputs" / "prm-qwen3")) == {1}

    def test_steps_that_are_one_text_are_refused(self, real, refused):
        assert "each step needs a label" in refused(*real([ROW | {"completions": " ".join(STEPS)}] * 4))

    def test_a_max_length_within_which_no_step_ends_is_refused(self, real, refused):
        flags = real()
        for flag in ("--max_length", "--max_completion_length"):
            message = refused(*flags, flag, "3")
            assert f"{flag[2:]}=3" in message
            assert "larger" in message

    def test_rows_without_steps_are_refused(self, real, refused):
        rows = [ROW | {"completions": [], "labels": []}] * 4
        assert "rows with steps" in refused(*real(rows))

    def test_a_separator_that_the_tokenizer_loses_is_refused(self, real, refused, own_model):
        """As a tokenizer does that drops blanks."""
        path = own_model / "tokenizer.json"
        settings = json.loads(path.read_text())
        settings["normalizer"] = {"type": "Strip", "strip_left": True, "strip_right": True}
        path.write_text(json.dumps(settings))
        message = refused(*real(model=own_model))
        assert "step_separator=' ' is nothing at all" in message
        assert "--step_separator" in message

    def test_a_stream_is_refused(self, real, refused):
        assert "--dataset_streaming" in refused(*real(), "--dataset_streaming")

    def test_a_newer_trl_is_refused_with_what_to_do(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "trl.experimental.prm", None)  # as if it were not there
        with pytest.raises(SystemExit) as stopped:
            load(EXAMPLES / "prm.py")
        for part in ("removed in TRL 1.14", "uv run prm.py", "pip install 'trl==", "no successor"):
            assert part in str(stopped.value)

    def test_a_row_without_steps_has_no_last_one(self, call, real, tmp_path):
        rows = [next(iter(self.formats.values()))] * 6 + [{"prompt": PROMPT, "completions": [], "labels": []}]
        call(*real([self.row(place, row) for place, row in enumerate(rows)]), "--train_on_last_step_only")
        assert set(logged(tmp_path / "outputs" / "prm-qwen3")) == {1}

    def test_a_separator_as_a_shell_leaves_it_is_refused(self, real, refused):
        flags = list(map(str, real()))
        assert "backslash" in refused(*flags, "--step_separator", r"\n")
