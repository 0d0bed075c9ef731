"""Generated tasks: deterministic, disjoint splits, right reference answers, verdicts that tell right from wrong."""

import re

import pytest

from nanochat.calculator import calculate
from nanochat.common import UserError
from nanochat.tasks import MIXTURES, TASKS, Answer, TaskMixture, make_task, parse_mixture
from nanochat.tasks.arithmetic import last_number
from nanochat.tasks.common import SPLITS, reference_text, split_of

N = 400


def problem_key(task, conversation) -> str:
    """What two conversations must not share across splits, read from the text alone."""
    question = conversation["messages"][0]["content"]
    if task.name.startswith("arithmetic"):
        return ",".join(sorted(re.findall(r"\d+", question), key=int))
    if task.name == "spelling":
        return reference_text(conversation)
    if task.name == "choice":
        return " ".join(sorted(re.findall(r"\w+", re.sub(r"=[A-D]\n", "\n", question))))
    return question


def tool_calls(conversation):
    parts = conversation["messages"][-1]["content"]
    return [(a["text"], b["text"]) for a, b in zip(parts, parts[1:], strict=False) if a["type"] == "python"]


def perfect_answer(conversation) -> Answer:
    content = conversation["messages"][-1]["content"]
    return Answer(reference_text(conversation), [] if isinstance(content, str) else tool_calls(conversation))


@pytest.mark.parametrize("name", TASKS)
def test_items_are_a_pure_function_of_split_and_index(name):
    first, second = make_task(name, "train", N), make_task(name, "train", 2 * N)
    assert [first[i] for i in range(50)] == [second[i] for i in range(50)]
    assert [first[i] for i in (3, 1, 3)] == [second[3], second[1], second[3]]
    assert first[0] != make_task(name, "test", N)[0]
    assert first[0] != make_task(name, "train", N, seed=1)[0]
    assert make_task(name, "train", N, seed=-1)[0] != make_task(name, "train", N, seed=1)[0]


@pytest.mark.parametrize("name", TASKS)
def test_no_problem_is_in_two_splits(name):
    keys = {}
    for split in SPLITS:
        task = make_task(name, split, N)
        keys[split] = {problem_key(task, task[i]) for i in range(N)}
        assert len(keys[split]) > (5 if name == "identity" else 20)
    assert not keys["train"] & keys["test"]
    assert not keys["train"] & keys["val"]
    assert not keys["val"] & keys["test"]


def test_the_same_operands_in_another_order_or_with_another_operator_stay_in_the_split():
    task = make_task("arithmetic", "train", 1)
    assert task.key(([37, 85], ["+"])) == task.key(([85, 37], ["-"]))
    assert task.key(([37, 85], ["+"])) != task.key(([37, 86], ["+"]))


def test_splits_get_their_shares():
    counts = {split: 0 for split in SPLITS}
    for i in range(5000):
        counts[split_of(f"problem {i}")] += 1
    assert 3850 < counts["train"] < 4150
    assert 400 < counts["val"] < 600
    assert 400 < counts["test"] < 600


@pytest.mark.parametrize("name", TASKS)
def test_conversations_alternate_user_and_assistant(name):
    task = make_task(name, "train", 50)
    assert len(task) == 50
    for i in range(50):
        messages = task[i]["messages"]
        assert [m["role"] for m in messages] == ["user", "assistant"]
        assert messages[0]["content"] and messages[1]["content"]
        assert ("letters" in task[i]) == (task.kind == "categorical")


@pytest.mark.parametrize("name", TASKS)
def test_the_reference_answer_is_right_and_an_empty_one_wrong(name):
    task = make_task(name, "test", 100)
    for i in range(100):
        conversation = task[i]
        assert task.evaluate(conversation, perfect_answer(conversation))
        assert task.reward(conversation, perfect_answer(conversation)) == 1.0
        assert not task.evaluate(conversation, Answer(""))
        assert task.reward(conversation, Answer("no")) == 0.0


def test_sums_are_held_out_with_the_arithmetic_they_are_part_of():
    trained, asked = make_task("arithmetic", "train", N), make_task("sums", "test", N)
    assert not {problem_key(trained, trained[i]) for i in range(N)} & {problem_key(asked, asked[i]) for i in range(N)}
    assert all("+" in tool_calls(asked[i])[0][0] for i in range(50))


@pytest.mark.parametrize("name", ["arithmetic", "arithmetic-hard"])
def test_arithmetic_calls_compute_the_question(name):
    task = make_task(name, "train", 300)
    symbols = {"plus": "+", "minus": "-", "times": "*", "sum": "+", "Add": "+", "difference": "-", "Multiply": "*",
               "product": "*", "+": "+", "-": "-", "*": "*"}
    for i in range(300):
        conversation = task[i]
        question = conversation["messages"][0]["content"]
        [(expression, result)] = tool_calls(conversation)
        assert re.findall(r"\d+", expression) == re.findall(r"\d+", question)
        words = [symbols[w] for w in re.findall(r"[a-zA-Z]+|[-+*]", question) if w in symbols]
        assert re.findall(r"[-+*]", expression) == words
        assert result == calculate(expression) == str(eval(expression))
        assert reference_text(conversation) == f"The answer is {result}."


def test_arithmetic_covers_operators_lengths_and_phrasings():
    task = make_task("arithmetic", "train", 600)
    questions = [task[i]["messages"][0]["content"] for i in range(600)]
    expressions = [tool_calls(task[i])[0][0] for i in range(600)]
    assert {re.sub(r"\d+", "", e) for e in expressions} == {"+", "-", "*"}
    assert {len(n) for e in expressions for n in re.findall(r"\d+", e)} == {1, 2, 3}
    assert len({re.sub(r"\d+", "N", q) for q in questions}) == 4 * 6 + 5
    assert len(set(questions)) > 580
    results = [int(calculate(e)) for e in expressions]
    assert min(results) < 0 < max(results)


def test_arithmetic_difficulty_is_a_parameter():
    task = make_task("arithmetic", "test", 40, terms=4, digits=5, operators="+")
    numbers = [re.findall(r"\d+", tool_calls(task[i])[0][0]) for i in range(40)]
    assert all(len(n) == 4 for n in numbers)
    assert max(len(x) for n in numbers for x in n) == 5


def test_arithmetic_judges_the_last_number_of_the_text():
    task = make_task("arithmetic", "test", 1)
    conversation = {"messages": [{"role": "user", "content": "What is 3 minus 10?"}, {"role": "assistant", "content": [
        {"type": "python", "text": "3-10"}, {"type": "python_output", "text": "-7"},
        {"type": "text", "text": "The answer is -7."}]}]}
    for text, verdict in [("The answer is -7.", True), ("3 minus 10 is -7", True), ("7", False), ("-7 or 8", False),
                          ("-70", False), ("-7.5", False), ("minus seven", False)]:
        assert task.evaluate(conversation, Answer(text)) is verdict, text
    assert task.expression_ok(conversation, Answer("-7", [("3-10", "-7")]))
    assert task.expression_ok(conversation, Answer("-7", [("3 - 10", "-7")]))
    assert not task.expression_ok(conversation, Answer("-7", [("10-3", "7")]))
    assert not task.expression_ok(conversation, Answer("-7", [("0-7", "-7")]))
    assert not task.expression_ok(conversation, Answer("-7", [("0-7", "-7"), ("3-10", "-7")]))
    assert not task.expression_ok(conversation, Answer("-7"))


def test_last_number():
    assert [last_number(t) for t in ("", "a 1 b 22.", "3.25", "x -4", "1,2")] == [None, "22", "3.25", "-4", "2"]


def test_numbers_are_cut_the_same_way_in_question_and_expression():
    import regex

    # nanochat's published split pattern (digits in ones and twos)
    pattern = regex.compile(
        r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"""
        r"""| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"""
    )
    task = make_task("arithmetic-hard", "train", 100)
    for i in range(100):
        texts = task[i]["messages"][0]["content"], tool_calls(task[i])[0][0]
        question, expression = ([chunk for chunk in pattern.findall(text) if chunk.isdigit()] for text in texts)
        assert question == expression


def test_spelling_gives_every_letter_once():
    task = make_task("spelling", "train", 200)
    for i in range(200):
        conversation = task[i]
        word = reference_text(conversation).replace(" ", "")
        assert word in conversation["messages"][0]["content"]
        assert reference_text(conversation) == " ".join(word)
        assert task.evaluate(conversation, Answer(f"  {' '.join(word).upper()}\n"))
        assert not task.evaluate(conversation, Answer(word))
        assert not task.evaluate(conversation, Answer(" ".join(word[:-1])))


def test_identity_answers_name_nanochat_or_its_skills():
    task = make_task("identity", "train", 100)
    topics = {reference_text(task[i]) for i in range(100)}
    assert len(topics) == 4
    name = next(task[i] for i in range(100) if "name" in task[i]["messages"][0]["content"])
    assert task.evaluate(name, Answer("My name is NanoChat!"))
    assert not task.evaluate(name, Answer("I am a model."))
    origin = next(task[i] for i in range(100) if "trained" in task[i]["messages"][0]["content"])
    assert task.evaluate(origin, Answer("nanochat trained me"))
    assert not task.evaluate(origin, Answer("nanochat"))


def test_choice_has_exactly_one_right_letter():
    task = make_task("choice", "train", 300)
    kinds = set()
    for i in range(300):
        conversation = task[i]
        question = conversation["messages"][0]["content"]
        choices = dict((letter, word) for word, letter in re.findall(r"- (\w+)=([A-D])\n", question))
        assert list(choices) == conversation["letters"] == ["A", "B", "C", "D"]
        assert len(set(choices.values())) == 4
        right = choices[reference_text(conversation)]
        head = question.splitlines()[0]
        if "largest" in head:
            assert int(right) == max(map(int, choices.values()))
        elif "starts" in head:
            letter = head[-2]
            assert [w for w in choices.values() if w[0] == letter] == [right]
        else:
            assert head.endswith(f" {right}?")
        kinds.add(head.split()[4])
        assert question.endswith("D\n\nRespond only with the letter of the correct answer.")
    assert kinds == {"choice", "number", "word"}
    letters = [reference_text(task[i]) for i in range(300)]
    assert all(45 < letters.count(letter) < 105 for letter in "ABCD")


def test_mixture_holds_every_conversation_once_in_a_fixed_order():
    arithmetic, spelling = make_task("arithmetic", "train", 30), make_task("spelling", "train", 20)
    mixture = TaskMixture([arithmetic, spelling])
    items = [str(mixture[i]) for i in range(len(mixture))]
    assert sorted(items) == sorted(str(t[i]) for t in (arithmetic, spelling) for i in range(len(t)))
    assert items == [str(TaskMixture([arithmetic, spelling])[i]) for i in range(50)]
    assert items != [str(TaskMixture([arithmetic, spelling], seed=1)[i]) for i in range(50)]
    assert any("Spell" in item or "spell" in item for item in items[:25])


def test_mixture_oversamples_by_listing_twice_or_by_count():
    task, other = make_task("identity", "train", 10), make_task("spelling", "train", 5)
    twice = TaskMixture([task, task, other])
    counted = TaskMixture([(task, 2), other])
    assert len(twice) == len(counted) == 25
    assert [twice[i] for i in range(25)] == [counted[i] for i in range(25)]


def test_mixtures_of_the_tiny_preset_parse_and_repeat_nothing():
    for stage in MIXTURES:
        assert len(parse_mixture(MIXTURES[stage]["tiny"][0], "train")) > 5000
    twice = parse_mixture("arithmetic=20,arithmetic=20", "val")
    assert len({str(twice[i]) for i in range(40)}) > 35


@pytest.mark.parametrize(("make", "message"), [
    (lambda: make_task("algebra", "train", 5),
     "unknown task 'algebra': choose from arithmetic, sums, arithmetic-hard, spelling, identity, choice, SmolTalk, "
     "MMLU, ARC-Easy, ARC-Challenge, GSM8K, HumanEval or json:FILE"),
    (lambda: make_task("spelling", "dev", 5), "unknown split 'dev' of task spelling: choose from train, val, test"),
    (lambda: make_task("spelling", "train", 0), "task spelling needs at least one problem, not 0"),
    (lambda: parse_mixture("arithmetic=5,spelling", "train"),
     "task spelling is generated and needs a number of problems, as in spelling=1000"),
    (lambda: parse_mixture("spelling=many", "train"),
     "a task mixture is written name=size,name=size, and 'spelling=many' is not"),
    (lambda: parse_mixture("", "train"), "a task mixture is written name=size,name=size, and '' is not"),
])
def test_user_mistakes_are_one_sentence(make, message):
    with pytest.raises(UserError) as error:
        make()
    assert str(error.value) == message


@pytest.mark.parametrize("index", [-1, 5])
def test_an_index_out_of_range_is_an_index_error(index):
    with pytest.raises(IndexError):
        make_task("spelling", "train", 5)[index]
    with pytest.raises(IndexError):
        TaskMixture([make_task("spelling", "train", 5)])[index]
