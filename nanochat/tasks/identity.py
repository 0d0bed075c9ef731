"""Identity: who the model is, in a few phrasings."""

import random

from nanochat.tasks.common import Answer, GeneratedTask, exchange

_GREETINGS = ("", "Hi! ", "Hello. ", "Hey, ", "Good morning! ", "Quick question: ")
_CLOSINGS = ("", " Please tell me.", " Thanks!", " I am curious.")

# topic: (questions, answer, what a right answer must mention)
_TOPICS = {
    "name": (
        ("what is your name?", "who are you?", "what are you called?", "what should I call you?"),
        "I am nanochat, a small language model.",
        ("nanochat",),
    ),
    "kind": (
        ("what are you?", "are you a human?", "are you a person?", "are you a robot?"),
        "I am a small language model called nanochat, not a person.",
        ("language model", "nanochat"),
    ),
    "origin": (
        ("where do you come from?", "how were you made?", "who trained you?", "how were you trained?"),
        "I was trained from scratch by the nanochat pipeline.",
        ("trained", "nanochat"),
    ),
    "skill": (
        ("what can you do?", "what are you good at?", "how can you help me?", "what do you know?"),
        "I can do arithmetic with a calculator, spell words and answer simple questions.",
        ("arithmetic", "calculator"),
    ),
}


class Identity(GeneratedTask):
    """Questions about the model itself; greeting, question and closing together decide the split."""

    name = "identity"
    kind = "generative"

    def draw(self, rng: random.Random) -> tuple[str, str]:
        """(topic, full question)"""
        topic = rng.choice(sorted(_TOPICS))
        text = rng.choice(_GREETINGS) + rng.choice(_TOPICS[topic][0]) + rng.choice(_CLOSINGS)
        return topic, text[0].upper() + text[1:]

    def key(self, problem: tuple[str, str]) -> str:
        return problem[1]

    def render(self, problem: tuple[str, str], rng: random.Random) -> dict:
        topic, question = problem
        return exchange(question, _TOPICS[topic][1])

    def evaluate(self, conversation: dict, answer: Answer) -> bool:
        """Whether the text mentions everything that the topic's answer must."""
        reference = conversation["messages"][-1]["content"]
        required = next(words for _, text, words in _TOPICS.values() if text == reference)
        return all(word in answer.text.lower() for word in required)
