"""dpo.py: what all scripts are tested for, and what only this one has to show."""

import json
import shutil
from types import SimpleNamespace

import pytest
import yaml
from examples import ASSISTANT, EXAMPLES, PREFERENCE, PROMPT, RIGHT, SHORT, USER, WRONG, Example, load, losses


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

    # -- the part that is the same in all fifteen: this script stands for the others ---------------------------------------

    def test_both_spellings_of_a_flag_choose_the_settings(self, script):
        for model, data in (("--model_name_or_path", "--dataset_name"), ("--model-name-or-path", "--dataset-name")):
            toy, script_args, training_args, model_args, _ = script.parse(
                [model, "some/model", data, "rows", "--use-cpu"]
            )
            assert not toy and (model_args.model_name_or_path, script_args.dataset_name) == ("some/model", "rows")
            assert training_args.lr_scheduler_type == script.REAL["lr_scheduler_type"]

    def test_half_of_a_flags_name_is_none(self, script):
        with pytest.raises(ValueError, match="--model_name"):
            script.parse(["--model_name", "some/model"])

    def test_a_yaml_file_is_read_behind_an_equals_sign_too(self, script, tmp_path):
        (tmp_path / "flags.yaml").write_text("model_name_or_path: some/model\nuse_cpu: true\n")
        toy, _, _, model_args, _ = script.parse([f"--config={tmp_path / 'flags.yaml'}"])
        assert not toy and model_args.model_name_or_path == "some/model"

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            (None, "cannot read --config"),
            ("a: [1", "cannot read --config"),
            ("- learning_rate", "not a list of flags"),
            ("eval_strategy: no", 'eval_strategy: "no"'),
        ],
    )
    def test_a_yaml_file_that_is_none_is_refused(self, text, words, refused, tmp_path):
        if text is not None:
            (tmp_path / "flags.yaml").write_text(text)
        assert words in refused("--config", tmp_path / "flags.yaml")

    def test_a_copy_without_the_toy_world_gives_help(self, tmp_path, capsys):
        shutil.copy(EXAMPLES / "dpo.py", tmp_path / "copied.py")
        with pytest.raises(SystemExit) as stopped:
            load(tmp_path / "copied.py").parse(["--help"])
        assert stopped.value.code == 0 and "--model_name_or_path" in capsys.readouterr().out

    def test_another_runs_folder_is_not_gone_on_with_or_replaced(self, call, refused, tmp_path):
        flags = [*SHORT, "--save_strategy", "steps", "--save_steps", "1"]
        call(*flags, "--output_dir", "mine")
        marker = tmp_path / "mine" / "run.json"
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "model.safetensors").write_text("somebody's weeks of work")
        checkpoint = tmp_path / "mine" / "checkpoint-1"
        message = refused(*flags, "--output_dir", "other", "--resume_from_checkpoint", checkpoint)
        assert "other holds another run" in message
        marker.write_text(json.dumps({"script": "cpo", "toy": True}))
        assert "of cpo.py" in refused(*flags, "--output_dir", "mine", "--resume_from_checkpoint", "true")
        marker.write_text(json.dumps({"script": "dpo", "toy": True}))
        call(
            *flags, "--output_dir", "new", "--resume_from_checkpoint", checkpoint
        )  # a folder of its own: nothing is lost
        assert losses(tmp_path / "new")[2] == pytest.approx(losses(tmp_path / "mine")[2], abs=1e-6)

    def test_resuming_is_asked_for_in_yaml_too(self, script, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for value, words in ((True, "no whole checkpoint"), (False, None)):
            text = yaml.safe_dump(
                {"model_name_or_path": "some/model", "use_cpu": True, "resume_from_checkpoint": value}
            )
            (tmp_path / "flags.yaml").write_text(text)
            toy, _, training_args, model_args, _ = script.parse(["--config", str(tmp_path / "flags.yaml")])
            if words:
                with pytest.raises(SystemExit, match=words):
                    script.check_folder(toy, training_args, model_args)
            else:
                assert script.check_folder(toy, training_args, model_args) is None

    def test_logs_alone_are_no_run(self, script, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        toy, _, training_args, model_args, _ = script.parse(["--model_name_or_path", "some/model", "--use_cpu"])
        folder = tmp_path / "outputs" / "dpo-model"
        (folder / "runs").mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps({"script": "dpo", "toy": False}))
        assert script.check_folder(toy, training_args, model_args) is None

    def test_only_the_whole_model_is_uploaded(self, script, tmp_path):
        pushed = []

        def save_model(folder):
            pushed.append(trainer.args.push_to_hub)
            (tmp_path / "unfinished").mkdir()
            (tmp_path / "unfinished" / "model.safetensors").write_text("weights")

        trainer = SimpleNamespace(
            args=SimpleNamespace(push_to_hub=True),
            accelerator=SimpleNamespace(is_main_process=True),
            save_model=save_model,
        )
        script.save(trainer, tmp_path)
        assert pushed == [False] and trainer.args.push_to_hub
        assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]

    def test_the_model_card_does_not_name_a_folder(self, script, call, monkeypatch):
        import transformers

        cards = []
        monkeypatch.setattr(transformers.Trainer, "init_hf_repo", lambda *_, **__: None)
        monkeypatch.setattr(script.DPOTrainer, "push_to_hub", lambda self, **named: cards.append(named))
        call(*SHORT, "--push_to_hub")
        assert cards == [{"dataset_name": None}]

    def test_the_model_is_saved_whatever_the_second_look_meets(self, script, call, monkeypatch, tmp_path):
        looks, held_out = [], script.held_out

        def look(*arguments):
            looks.append(1)
            if len(looks) == 2:
                raise RuntimeError("the second look")
            return held_out(*arguments)

        monkeypatch.setattr(script, "held_out", look)
        with pytest.raises(RuntimeError, match="the second look"):
            call(*SHORT)
        assert (tmp_path / "outputs" / "dpo-toy" / "model.safetensors").is_file()

    @pytest.mark.parametrize(
        ("row", "words"),
        [
            ({"question": PROMPT, "chosen": RIGHT, "rejected": WRONG}, "is yours in ['question']"),
            ({"chosen": "19", "rejected": "20 or so"}, "these have none, so add one"),
            (
                {"chosen": ASSISTANT, "rejected": [{"role": "assistant", "content": "20"}]},
                "these have none, so add one",
            ),
            (
                {"prompt": PROMPT, "chosen": json.dumps(USER + ASSISTANT), "rejected": RIGHT},
                "'chosen' holds messages as one text",
            ),
            (
                {"prompt": PROMPT, "chosen": None, "rejected": WRONG},
                "row 1 of the split 'train' has None in the column",
            ),
            (
                {"prompt": [{"from": "human", "value": PROMPT}], "chosen": ASSISTANT, "rejected": ASSISTANT},
                "a message needs role and content",
            ),
        ],
        ids=["question", "nothing alike", "answers alone", "text of messages", "None", "from and value"],
    )
    def test_pairs_without_a_prompt_and_messages_of_another_kind_are_refused(self, row, words, real, refused):
        first = {"prompt": PROMPT, "chosen": RIGHT, "rejected": WRONG}
        assert words in refused(*real([first, row] if row.get("chosen", "") is None else [row] * 4))

    def test_a_question_that_the_answers_repeat_is_no_prompt_that_is_missing(self, script):
        from datasets import Dataset

        row = {"question": PROMPT, "chosen": f"{PROMPT} is 19", "rejected": f"{PROMPT} is 20"}
        assert len(script.load_split({"train": Dataset.from_list([row])}, "train")) == 1

    def test_a_template_that_cannot_render_the_rows_is_refused(self, real, refused, own_model):
        template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system here') }}{% endif %}"
        path = own_model / "chat_template.jinja"
        path.write_text(template + path.read_text())
        row = {"prompt": [{"role": "system", "content": "Add."}, *USER], "chosen": ASSISTANT, "rejected": ASSISTANT}
        assert "cannot render the first row: No system here" in refused(*real([row] * 4, model=own_model))

    def test_a_text_beside_pairs_of_messages_is_left_out(self, script):
        from datasets import Dataset

        row = {"prompt": USER, "chosen": ASSISTANT, "rejected": ASSISTANT, "completion": RIGHT, "messages": USER}
        split = script.load_split({"train": Dataset.from_list([row])}, "train")
        assert set(split.column_names) == {"prompt", "chosen", "rejected"}

    def test_splits_with_other_columns_are_refused_with_the_reason(self, real, refused, tmp_path):
        flags = real()
        path = tmp_path / "data" / "test.jsonl"
        rows = [json.loads(line) | {"score": 1} for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert "column names don't match" in refused(*flags)

    def test_a_file_in_place_of_a_folder_is_refused(self, real, refused, tmp_path):
        flags = [tmp_path / "data" / "train.jsonl" if flag == tmp_path / "data" else flag for flag in real()]
        assert "give its folder" in refused(*flags)

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"streaming": True, "test_split_size": 0.5}, "a stream has no known end"),
            ({"datasets": [{"path": "nowhere"}]}, "cannot load 'the mixture'"),
            ({"eval_strategy": "steps"}, "a mixture makes one with test_split_size"),
        ],
        ids=["stream", "nowhere", "no test split"],
    )
    def test_a_mixture_that_cannot_be_made_is_refused(self, settings, words, real, refused, tmp_path):
        flags = real()
        place = flags.index("--dataset_name")
        mixture = {"datasets": [{"path": str(flags[place + 1]), "split": "train"}]} | settings
        (tmp_path / "mixture.yaml").write_text(yaml.safe_dump(mixture))
        assert words in refused(*flags[:place], *flags[place + 2 :], "--config", tmp_path / "mixture.yaml")

    def test_a_tokenizer_without_an_end_token_is_refused(self, real, refused, own_model):
        path = own_model / "tokenizer_config.json"
        settings = json.loads(path.read_text())
        path.write_text(json.dumps({name: value for name, value in settings.items() if name != "eos_token"}))
        assert "no token that ends an answer" in refused(*real(model=own_model))
