"""reference_guides/datasets.md: its matrix is a sample of cells run anew, and its sentences hold in the measurement."""

import os
import re

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import formats
import pytest
from drift import slug
from formats import FORMATS, ITS_OWN, SAMPLING, TRAINERS
from markdown_pages import GUIDES, run_page
from trl import apply_chat_template, extract_prompt, pack_dataset, unpair_preference_dataset

PAGE = GUIDES / "datasets.md"
TEXT = PAGE.read_text("utf-8")
MEASURED = formats.measured()
CELLS, CLOSER = MEASURED["cells"], MEASURED["closer"]
PAIRED = ("reward", "dpo", "kto", "orpo", "cpo", "bco")  # those that take pairs


def joined(row) -> str:
    return "".join(text for text, _ in row)


def learned(row) -> str:
    return "".join(text for text, loss in row if loss)


# --- the measurement ------------------------------------------------------------------------------------------------------


def test_the_measurement_has_every_trainer_and_every_format():
    assert len(TRAINERS) == 15
    assert list(CELLS) == list(TRAINERS) == list(CLOSER)
    for name in TRAINERS:
        assert list(CELLS[name]) == list(FORMATS), name
        for one in CELLS[name].values():
            assert one["result"] in {"trains", "constructor", "step"}
            assert ("error" in one) == (one["result"] != "trains")
            assert ("rows" in one and "silent" in one) == (one["result"] == "trains")


def test_no_cell_ran_out_of_time():
    assert "TimeoutError" not in {one.get("error") for cells in CELLS.values() for one in cells.values()}


ANEW = [
    *[(name, next(filter(None, ITS_OWN[name]))) for name in TRAINERS if name not in ("nash_md", "xpo")],
    *[("sft", "preference"), ("sft", "tokenized"), ("dpo", "implicit"), ("dpo", "tokenized")],
    *[("cpo", "implicit messages"), ("bco", "text"), ("kto", "preference"), ("reward", "repeated"), ("ppo", "prompt")],
    *[("gkd", "completion messages"), ("prm", "steps messages"), ("grpo", "steps"), ("online_dpo", "messages")],
    *[("nash_md", "text"), ("xpo", "tokenized prompt")],
]
WHOLE = [("sft", "unpaired"), ("dpo", "repeated messages"), ("rloo", "completion"), ("ppo", "tokenized")]
NAMED = {"ids": lambda value: value.replace(" ", "-")}


@pytest.mark.parametrize("name, key", ANEW, **NAMED)
def test_a_step_run_anew_is_the_committed_one(name, key):
    now, _ = formats.one_step(name, FORMATS[key][2]())
    then = CELLS[name][key]
    assert (now["result"], now.get("error")) == (then["result"], then.get("error"))
    if name not in SAMPLING:
        assert now.get("rows") == then.get("rows")


@pytest.mark.parametrize("name, key", WHOLE, **NAMED)
def test_a_cell_run_anew_is_the_committed_one(name, key):
    now, then = formats.cell(name, key), CELLS[name][key]
    assert [now.get(what) for what in ("result", "answers", "labels", "silent")] == [
        then.get(what) for what in ("result", "answers", "labels", "silent")
    ]


def test_the_silent_points_follow_from_what_was_read():
    for name in TRAINERS:
        for key, one in CELLS[name].items():
            if one["result"] == "trains":
                assert one["silent"] == formats.silent(name, FORMATS[key][1], one), (name, key)


@pytest.mark.parametrize("name", ["dpo", "cpo", "bco", "gkd"])
def test_a_cut_row_is_the_committed_one(name):
    form, key = next((form, key) for form, key in zip(("messages", "text"), ITS_OWN[name], strict=True) if key)
    now, _ = formats.one_step(name, FORMATS[key][2](), max_length=formats.LIMIT)
    assert now == CLOSER[name][f"{form}, cut"]


def test_the_reader_sees_padding_and_loss_where_they_are():
    # SFT on rows of different length: the labels of the collator say which tokens count, the gradient says the same
    rows = [{"prompt": "1+1", "completion": " 1+1=2 #2"}, {"prompt": "1+1+10", "completion": " #12"}]
    step, _ = formats.one_step("sft", rows)
    assert sorted(step["rows"]) == [
        [["1+1", False], [" 1+1=2 #2<|end|>", True]],
        [["1+1+10", False], [" #12<|end|>", True]],
    ]


def test_changed_rows_are_changed_where_they_should_be():
    row = FORMATS["preference messages"][2]()[0]
    turned, other = formats.turned_round(row), formats.other_answers(row)
    assert turned == row | {"chosen": row["rejected"], "rejected": row["chosen"]}
    assert other["prompt"] == row["prompt"] and other["chosen"][0]["content"] == row["chosen"][0]["content"] + "0"
    steps = FORMATS["steps"][2]()[0]
    assert formats.turned_round(steps)["labels"] == [not label for label in steps["labels"]]
    assert formats.other_answers(steps)["completions"] == [step + "0" for step in steps["completions"]]


# --- what the page says about the matrix ----------------------------------------------------------------------------------


def states(name):
    return {key: formats.state(name, one) for key, one in CELLS[name].items()}


@pytest.mark.parametrize("name", TRAINERS)
def test_each_trainer_takes_what_it_was_made_for(name):
    assert {states(name)[key] for key in ITS_OWN[name] if key} == {"yes"}


def test_the_prompt_alone_is_used_by_trainers_that_sample():
    found = {name for name in TRAINERS if "prompt" in states(name).values()}
    assert found == set(SAMPLING) - {"ppo"}


def test_labels_are_not_read_by_sft():
    assert {key for key, one in CELLS["sft"].items() if "labels not read" in one.get("silent", ())} == {
        "unpaired",
        "unpaired messages",
    }


def test_a_repeated_question_is_read_twice_by_every_trainer_that_takes_pairs():
    for name in PAIRED:
        for key in ("repeated", "repeated messages"):
            assert CELLS[name][key]["silent"] == ["question twice"], (name, key)


def test_an_implicit_prompt_of_text_leaves_only_a_part_to_learn():
    found = {name for name in TRAINERS if "answer learned in part" in CELLS[name]["implicit"].get("silent", ())}
    assert found == {"dpo", "kto", "cpo", "bco", "orpo"}
    chosen = [learned(row) for row in CELLS["orpo"]["implicit"]["rows"][:2]]
    assert all(part.endswith("15<|end|>") and "=" in part.split(" ")[1] for part in chosen)
    for name in PAIRED:
        assert states(name)["implicit messages"] == "yes"


def test_ppo_takes_a_conversation_for_a_prompt():
    assert CELLS["ppo"]["tokenized"]["silent"] == ["answer taken for the prompt"]


def test_trainers_that_sample_and_gkd_notice_in_the_first_step():
    stages = {name: {one["result"] for one in CELLS[name].values()} - {"trains"} for name in TRAINERS}
    assert {name for name in TRAINERS if stages[name] == {"step"}} == {*SAMPLING, "gkd"}
    for name in set(TRAINERS) - {*SAMPLING, "gkd"}:
        late = {key for key, one in CELLS[name].items() if one["result"] == "step"}
        assert late == ({"tokenized", "tokenized prompt"} if name == "prm" else set()), name


def test_a_column_named_completions_collides_with_a_reward_function():
    for name in ("grpo", "rloo", "online_dpo"):
        assert CELLS[name]["steps"]["error"] == "TypeError"
    for name in ("nash_md", "xpo"):
        assert states(name)["steps"] == "prompt"


def test_a_repeated_prompt_tears_the_header_in_nash_md_and_xpo():
    for name in ("nash_md", "xpo"):
        one = CELLS[name]["repeated messages"]
        assert "header of the answer lost" in one["silent"]
        assert all(row[0][0].endswith("<|end|><|") for row in one["rows"])


def test_text_is_not_rendered_by_any_trainer():
    for name in TRAINERS:
        for key, one in CELLS[name].items():
            if FORMATS[key][1].startswith("text"):
                assert not any("<|user|>" in joined(row) for row in one.get("rows", ())), (name, key)


# --- which tokens carry loss -----------------------------------------------------------------------------------------------


def test_who_learns_the_question():
    learns = {}
    for name in TRAINERS:
        for key in ("messages", *(ITS_OWN[name])):
            if key and CELLS[name][key]["result"] == "trains":
                rows = CELLS[name][key]["rows"]
                learns[name, key] = any("+5+8<" in learned(r) or "+5+8 " in learned(r) for r in rows)
    assert {where for where, it_does in learns.items() if it_does} == {
        ("sft", "messages"),
        ("orpo", "preference messages"),
        ("orpo", "preference"),
    }


@pytest.mark.parametrize("name", ["sft", "dpo", "kto", "cpo", "bco", "gkd"])
def test_answers_are_learned_whole_and_with_their_end(name):
    for key in filter(None, ITS_OWN[name]):
        whole = {text for _, right, wrong in formats.answers() for text in (right, wrong)}
        for row in CELLS[name][key]["rows"]:
            assert learned(row).removesuffix(formats.END).strip() in whole
            assert learned(row).endswith(formats.END)


def test_scores_are_read_at_one_token_or_one_for_each_step():
    for key in ITS_OWN["reward"]:
        assert {learned(row) for row in CELLS["reward"][key]["rows"]} == {formats.END}
    assert {learned(row) for row in CELLS["prm"]["steps"]["rows"]} == {"\n" * 3}


@pytest.mark.parametrize("name", SAMPLING)
def test_trainers_that_sample_learn_what_stands_behind_the_prompt(name):
    rows = CELLS[name][ITS_OWN[name][0] or ITS_OWN[name][1]]["rows"]
    if name == "nash_md":  # a row whose two answers are the same has no gradient in the first step
        rows = [row for row in rows if len(row) > 1]
    assert rows
    for row in rows:
        assert [loss for _, loss in row] == [False, True]
        assert row[0][0].endswith("<|assistant|>")


# --- cut and dropped, the two ends ------------------------------------------------------------------------------------------


def cut(name, form):
    return CLOSER[name][f"{form}, cut"]


def test_where_rows_are_cut():
    for name in ("sft", "dpo", "kto"):
        for form in ("messages", "text"):
            rows = cut(name, form)["rows"]
            assert not any(joined(row).endswith(formats.END) for row in rows)
            assert all(not row[0][1] and any(q in joined(row) for q, _, _ in formats.PROBLEMS) for row in rows)
    for form in ("messages", "text"):
        assert all(learned(row).endswith(formats.END) for row in cut("bco", form)["rows"])
        assert "num_samples=0" in cut("reward", form)["message"]
    assert cut("orpo", "text")["error"] == "nan"
    assert "" in [learned(row) for row in cut("cpo", "text")["rows"]]
    for name in ("orpo", "cpo"):
        tokens = [len(formats.toy_tokenizer()(joined(row))["input_ids"]) for row in cut(name, "messages")["rows"]]
        assert max(tokens) < formats.LIMIT - 5
    gkd = [joined(row) for row in cut("gkd", "messages")["rows"]]
    assert all(row.endswith(formats.END) and "<|user|>" not in row for row in gkd)


@pytest.mark.parametrize("name", ["sft", "dpo", "kto"])
def test_a_row_whose_prompt_fills_the_limit_is_dropped(name):
    step, weights = formats.one_step(name, FORMATS[ITS_OWN[name][0]][2](), max_length=8)  # the prompts have 8 tokens
    if name == "kto":
        assert step == {"result": "trains", "rows": []} and weights  # no error, and nothing was trained
    else:
        assert step["result"] == "step" and "num_samples=0" in step["message"]


def test_there_is_one_bos_at_most():
    for name in TRAINERS:
        for key, count in CLOSER[name].items():
            if ", bos" in key:
                assert count in ([0], [1]), (name, key)
        if "text, bos" in CLOSER[name]:
            assert CLOSER[name]["text, bos"] == [0 if name == "online_dpo" else 1], name
    assert {name for name in TRAINERS if CLOSER[name].get("messages, bos") == [1]} == {
        *("orpo", "cpo", "bco", "nash_md", "xpo"),
    }


def test_a_pad_token_that_is_eos_moves_the_score_and_nothing_else():
    for name in ("sft", "dpo", "kto", "orpo", "cpo", "bco", "gkd"):
        assert {tuple(v) for key, v in CLOSER[name].items() if "pad eos" in key} == {(True,)}, name
    assert {tuple(v) for key, v in CLOSER["reward"].items() if "pad eos" in key} == {(False,)}
    assert CLOSER["prm"]["text, eos"] == [False]


def test_who_packs_and_who_lays_rows_behind_one_another():
    def having(field):
        return {name for name in TRAINERS if field in formats.classes(name)[0].__dataclass_fields__}

    assert having("packing") == {"sft", "gkd"}
    assert having("padding_free") == {"sft", "dpo", "gkd"}
    for more in ({"packing": True}, {"padding_free": True, "max_length": None}):
        step, _ = formats.one_step("gkd", FORMATS["messages"][2](), **more)
        assert step["result"] == "constructor", more


# --- the blocks of the page -------------------------------------------------------------------------------------------------


def test_conversions_on_the_page_are_those_of_trl():
    space = run_page(PAGE).namespace
    explicit = space["explicit"]
    assert explicit == extract_prompt(space["implicit"])
    assert apply_chat_template(explicit, space["tokenizer"])["chosen"].endswith(formats.END)
    pairs = space["Dataset"].from_list([explicit, explicit])
    assert unpair_preference_dataset(pairs)["label"][:] == [True, True, False, False]
    packs = pack_dataset(space["rows"], seq_length=5, strategy="bfd")
    assert 11 not in [token for pack in packs["input_ids"][:] for token in pack]


def test_the_border_of_text_is_the_first_difference():
    assert extract_prompt({"chosen": "ab cd", "rejected": "ab ce"})["prompt"] == "ab c"
    assert extract_prompt({"chosen": "ab cd", "rejected": "ab ed"})["prompt"] == "ab"  # a space before it goes along


# --- links --------------------------------------------------------------------------------------------------------------------


def headings(path):
    lines = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", path.read_text("utf-8"), flags=re.M | re.S), re.M)
    return {slug(line) for line in lines}


def test_every_link_leads_to_a_section_that_exists():
    found = re.findall(r"\]\(((?!https?:)[^)#]*)(?:#([^)]*))?\)", TEXT)
    assert len(found) > 60  # most of them in tables
    for file, section in found:
        path = (PAGE.parent / file).resolve() if file else PAGE
        assert path.exists(), file
        assert not section or section in headings(path), f"{file}#{section}"


def test_the_tables_of_the_page_are_those_of_the_measurement(capsys):
    for function in re.findall(r"\[\[\[cog import formats; formats\.(\w+)\(\) \]\]\]", TEXT):
        getattr(formats, function)()
        assert capsys.readouterr().out.strip() in TEXT, f"{function}: run `make sync`"
