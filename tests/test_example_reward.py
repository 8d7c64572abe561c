"""reward.py: what all scripts are tested for, and what only this one has to show."""

import json
import math
import shutil
from pathlib import Path

import pytest
from examples import (
    ASSISTANT,
    EXAMPLES,
    PREFERENCE,
    PROMPT,
    RIGHT,
    SHORT,
    TOY,
    WRONG,
    Example,
    load,
    logged,
    losses,
    write_rows,
)

LONG = {"prompt": PROMPT + " ", "chosen": RIGHT, "rejected": " ".join([WRONG] * 5)}


def scores_of(folder, texts: list[str]) -> list[float]:
    """What a saved reward model gives, opened without TRL, one text at a time so that nothing is padded."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        ids = [tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"] for text in texts]
        return [model(input_ids=one).logits.item() for one in ids]


class TestReward(Example):
    name = "reward"
    formats = PREFERENCE
    needs = ({"chosen", "rejected"},)
    figure = "accuracy"
    gain = 0.3
    least = 0.95
    at_start = {"accuracy": (0.5, 0.15)}  # `score` is random
    printed = {
        "chosen_ids": r"<\|system\|>mark<\|end\|><\|user\|>[\d+]+<\|end\|><\|assistant\|>[\d+= ]+ #\d+<\|end\|>",
        "rejected_ids": r"<\|system\|>mark<\|end\|><\|user\|>[\d+]+<\|end\|><\|assistant\|>\d.*<\|end\|>",
        "score at": r"'<\|end\|>', the last token of each",
    }
    flags = ("--max_length", "96")

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

    def test_the_saved_model_orders_the_held_out_pairs_without_the_system_message(self, bare):
        """As ppo.py calls it. The pairs are those of the test split, and the figure is the one that the run printed."""
        rows = [json.loads(line) for line in (TOY / "data" / "preference" / "test.jsonl").read_text().splitlines()]
        texts = [
            f"<|user|>{row['prompt'][0]['content']}<|end|><|assistant|>{row[answer][0]['content']}<|end|>"
            for row in rows
            for answer in ("chosen", "rejected")
        ]
        found = scores_of(bare[0], texts)
        right = [chosen > rejected for chosen, rejected in zip(found[::2], found[1::2], strict=True)]
        after = json.loads((bare[0] / "held_out.json").read_text())["after"]
        assert sum(right) / len(right) == pytest.approx(after["accuracy"], abs=1e-6)
        assert after["accuracy"] >= 0.95

    @pytest.mark.parametrize("script", ["ppo", "grpo", "rloo", "online_dpo", "nash_md", "xpo"])
    def test_the_folder_is_a_reward_model_for_other_scripts(self, script, bare, small_world, call, tmp_path):
        module = load(Path(shutil.copy(EXAMPLES / f"{script}.py", small_world.parent)))
        flag = "--reward_model_name_or_path" if script in ("grpo", "rloo") else "--reward_model_path"
        call(flag, bare[0], *SHORT, "--output_dir", script, module=module)
        assert set(logged(tmp_path / script)) == {1, 2}

    def test_it_goes_on_from_a_folder_that_sft_has_written(self, call, tmp_path, capsys):
        sft = shutil.copytree(TOY / "policy", tmp_path / "outputs" / "sft-toy")
        (sft / "run.json").write_text('{"script": "sft", "toy": true}')
        call("--model_name_or_path", sft, *SHORT)
        assert json.loads((tmp_path / "outputs" / "reward-toy" / "config.json").read_text())["num_hidden_layers"] == 5
        assert "accuracy" in capsys.readouterr().out

    # -- the two remedies of the toy, and a plain run --------------------------------------------------------------------

    def test_a_real_run_is_a_plain_one(self, script, trainer):
        _, script_args, *_ = script.parse(["--model_name_or_path", "some/model", "--use_cpu"])
        assert (script_args.new_layers, script_args.system_message, script_args.new_learning_rate) == (0, None, None)
        row = PREFERENCE["conversational, explicit prompt"]
        built = trainer([row] * 4)
        assert built.model.config.num_hidden_layers == 2
        assert built.optimizer is None  # Trainer makes it
        tokens = built.processing_class.apply_chat_template(row["prompt"] + row["chosen"], return_dict=True)
        assert all(pair["chosen_ids"] == tokens["input_ids"] for pair in built.train_dataset)

    @pytest.mark.parametrize("name", list(PREFERENCE)[:4])
    def test_every_second_training_pair_gets_the_system_message(self, name, trainer):
        built = trainer([PREFERENCE[name]] * 4, "--system_message", "mark")
        decode = built.processing_class.decode
        marked = ["mark" in decode(row["chosen_ids"]) for row in built.train_dataset]
        assert marked == ["mark" in decode(row["rejected_ids"]) for row in built.train_dataset]
        assert marked == [True, False, True, False]
        assert not any("mark" in decode(row["chosen_ids"]) for row in built.eval_dataset)

    @pytest.mark.parametrize("architecture", ["Qwen3", "Llama"])
    def test_new_layers_stand_on_top_of_those_of_the_model(self, architecture, trainer, tiny_models):
        import torch
        from safetensors.torch import load_file

        folder = tiny_models[architecture]
        flags = ("--model_name_or_path", str(folder), "--new_layers", "2")
        built = trainer([PREFERENCE["text, explicit prompt"]] * 2, *flags)
        assert built.model.config.num_hidden_layers == len(built.model.model.layers) == 4
        weights = built.model.state_dict()
        for name, tensor in load_file(folder / "model.safetensors").items():
            if name != "lm_head.weight":
                assert torch.equal(weights[name], tensor), name

    def test_new_weights_have_a_learning_rate_of_their_own(self, trainer):
        rates = ("--learning_rate", "1e-4", "--new_layers", "1", "--new_learning_rate", "1e-2", "--weight_decay", "0.1")
        built = trainer([PREFERENCE["text, explicit prompt"]] * 2, *rates)
        names = {id(weight): name for name, weight in built.model.named_parameters()}
        slow, fast = built.optimizer.param_groups
        assert (slow["lr"], fast["lr"], slow["weight_decay"]) == (1e-4, 1e-2, 0.1)
        new = {name for name in names.values() if name.startswith(("score.", "model.layers.2."))}
        assert {names[id(weight)] for weight in fast["params"]} == new
        assert {names[id(weight)] for weight in slow["params"]} == set(names.values()) - new

    def test_an_adapter_with_new_layers_is_whole_and_loads(self, call, tmp_path):
        """`score` and the new layer are in the adapter; whoever loads it says how large the model is."""
        import peft
        import torch

        call("--use_peft", "--lora_r", "4", "--learning_rate", "1e-3", *SHORT, "--output_dir", "lora")
        size = {"num_labels": 1, "num_hidden_layers": 5, "layer_types": ["full_attention"] * 5}
        loaded = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "lora", **size)
        merged = loaded.merge_and_unload()
        merged.config.pad_token_id = 0
        saved = peft.load_peft_weights(str(tmp_path / "lora"))
        for part in ("score.weight", "layers.4.mlp.up_proj.weight"):
            [tensor] = [tensor for name, tensor in saved.items() if name.endswith(part)]
            assert torch.equal(merged.get_parameter(part if part[0] == "s" else f"model.{part}"), tensor)

    def test_an_adapter_trains_the_score(self, trainer):
        """With TRL's default task type, CAUSAL_LM, PEFT asks for a method that this model does not have."""
        built = trainer([PREFERENCE["text, explicit prompt"]] * 2, "--use_peft")
        learning = [name for name, weight in built.model.named_parameters() if weight.requires_grad]
        assert any("score" in name for name in learning)
        assert any("lora_" in name for name in learning)

    # -- the loss --------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize(("margin", "center"), [(0.0, 0.01), (0.5, 0.01), (0.0, 0.1)])
    def test_the_loss_is_that_of_the_formula(self, margin, center, trainer):
        row = PREFERENCE["text, explicit prompt"] | ({"margin": margin} if margin else {})
        built = trainer([row] * 2, "--center_rewards_coefficient", str(center))
        metrics = built.evaluate()
        batch = built.data_collator([built.train_dataset[0]])
        chosen, rejected = built.model(batch["input_ids"], batch["attention_mask"]).logits[:, 0].tolist()
        loss = math.log(1 + math.exp(-(chosen - rejected - margin)))
        assert metrics["eval_loss"] == pytest.approx(loss + center * (chosen + rejected) ** 2, abs=1e-5)
        assert metrics["eval_margin"] == pytest.approx(chosen - rejected, abs=1e-5)

    def test_equal_answers_are_counted(self, call, real, tmp_path, capsys):
        rows = [PREFERENCE["text, explicit prompt"] | {"rejected": RIGHT}] + [PREFERENCE["text, explicit prompt"]] * 7
        call(*real(rows))
        assert "the same in 1 of the first 8 pairs, which teach nothing" in capsys.readouterr().out

    def test_accumulated_gradients_are_those_of_one_batch(self, call, real, tmp_path):
        flags = real([PREFERENCE["text, explicit prompt"]] * 8)
        for size, times in (("4", "1"), ("1", "4")):
            sizes = ("--per_device_train_batch_size", size, "--gradient_accumulation_steps", times)
            call(*flags, *sizes, "--output_dir", f"{size}x{times}")
        one, four = (logged(tmp_path / output)[1] for output in ("4x1", "1x4"))
        for key in ("loss", "grad_norm"):
            assert one[key] == pytest.approx(four[key], rel=1e-3)

    def test_it_trains_on_a_stream(self, call, real, tmp_path):
        call(*real(), "--dataset_streaming", "--system_message", "mark")
        assert set(logged(tmp_path / "outputs" / "reward-qwen3")) == {1}

    # -- bad input -------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("streaming", [(), ("--dataset_streaming",)], ids=["whole", "streamed"])
    @pytest.mark.parametrize("length", ["20", "4"])
    def test_a_max_length_that_drops_every_pair_is_refused(self, length, streaming, real, refused):
        message = refused(*real(), "--max_length", length, *streaming)
        assert f"max_length={length}" in message
        assert "larger" in message

    def test_a_test_split_of_long_pairs_is_refused(self, real, refused, tmp_path):
        flags = real([PREFERENCE["text, explicit prompt"]] * 4)
        (tmp_path / "data" / "test.jsonl").write_text(json.dumps(LONG) + "\n")
        assert "every pair of the split 'test' has an answer" in refused(*flags)

    def test_a_pair_that_is_too_long_is_left_out_and_counted(self, call, real, capsys):
        call(*real([LONG] + [PREFERENCE["text, explicit prompt"]] * 7))
        assert (
            "1 of 8 pairs of the split 'train' are longer than max_length=96 tokens and are left out"
            in capsys.readouterr().out
        )

    def test_pairs_of_equal_answers_are_refused(self, real, refused):
        rows = [PREFERENCE["conversational, explicit prompt"] | {"rejected": ASSISTANT}] * 8
        assert "the same in each of the first 8 pairs" in refused(*real(rows))

    @pytest.mark.parametrize("margins", [("large", "small"), (None, None), (1.0, None), ([1.0], [2.0])], ids=str)
    def test_a_margin_that_is_no_number_is_refused(self, margins, real, refused):
        rows = [PREFERENCE["text, explicit prompt"] | {"margin": margin} for margin in margins * 4]
        message = refused(*real(rows))
        assert "margin must be a number" in message
        assert repr(margins[1] if margins[0] == 1.0 else margins[0]) in message

    def test_a_held_out_margin_that_is_no_number_is_refused(self, real, refused, tmp_path):
        row = PREFERENCE["text, explicit prompt"]
        flags = real([row | {"margin": 1.0}] * 4)
        write_rows(tmp_path / "other", [row | {"margin": margin} for margin in (1.0, None)])
        (tmp_path / "other" / "test.jsonl").replace(tmp_path / "data" / "test.jsonl")
        assert "in the split 'test' there is None" in refused(*flags)

    @pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
    def test_answers_that_are_numbers_are_refused(self, column, real, refused):
        message = refused(*real([PREFERENCE["text, explicit prompt"] | {column: 19}] * 4))
        assert f"{column} must be a text or a list of messages" in message
        assert "19" in message

    def test_a_policy_without_a_pad_token_is_refused_and_a_flag_helps(self, real, call, refused, own_model, tmp_path):
        path = own_model / "tokenizer_config.json"
        settings = json.loads(path.read_text())
        del settings["pad_token"]
        path.write_text(json.dumps(settings))
        flags = real(model=own_model)
        assert "pads with None" in refused(*flags)
        call(*flags, "--pad_token", "<|pad|>")
        config = json.loads((tmp_path / "outputs" / "reward-model" / "config.json").read_text())
        assert config["pad_token_id"] == 0  # the model finds the end of a padded answer by it

    def test_the_margins_of_the_data_are_taken_off(self, call, real, tmp_path):
        rows = [PREFERENCE["text, explicit prompt"] | {"margin": 3.0}] * 8
        call(*real(rows))
        assert losses(tmp_path / "outputs" / "reward-qwen3")[1] > 2

    def test_an_adapter_is_to_be_merged_as_what_it_is(self, real, refused, own_model):
        flags = real(model=own_model)
        for task, kind in (("SEQ_CLS", "SequenceClassification"), ("TOKEN_CLS", "TokenClassification")):
            (own_model / "adapter_config.json").write_text(json.dumps({"task_type": task}))
            assert f"peft.AutoPeftModelFor{kind}.from_pretrained" in refused(*flags)

    def test_pairs_without_a_prompt_are_data_for_a_reward_model(self, call, real, tmp_path):
        call(*real([{"chosen": "Good.", "rejected": "Bad.", "question": PROMPT}] * 8))
        assert set(logged(tmp_path / "outputs" / "reward-qwen3")) == {1}

    def test_a_margin_that_is_nan_in_a_later_row_is_refused(self, script):
        from datasets import Dataset

        row = {"chosen": RIGHT, "rejected": WRONG}
        with pytest.raises(SystemExit, match="margin must be a number"):
            script.check_rows(Dataset.from_list([row | {"margin": 1.0}, row | {"margin": float("nan")}]), "train")
