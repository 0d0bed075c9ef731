"""Measure the tokenizer's compression: python -m scripts.tok_eval --data builtin

UTF-8 bytes per token, total over total, by kind of text: the training and validation documents and five short texts of
this file. Every text must come back exactly as it went in.
"""

import argparse

from nanochat.common import UserError, base_dir, run_script
from nanochat.dataset import iter_texts, open_dataset
from nanochat.report import Report
from nanochat.tokenizer import Tokenizer

NEWS = """\
The harbour bridge will stay closed until Friday, the city said on Tuesday, after engineers found a crack in one of \
the two cables that carry its eastern span. About 41,000 cars and trucks cross the bridge on a weekday; most of them \
were sent through the old tunnel, where the morning queue reached nearly six miles. "We would rather be early than \
sorry," said Maria Okafor, who leads the roads department. She added that the crack, first seen by a maintenance \
crew at 4:30 a.m., hadn't grown since sensors were attached to the cable.

Shop owners near the ramps were less patient. "It's the third closure this year, and nobody's told us who'll pay," \
said Tom Berger, whose bakery lost more than half of its customers within a day. The council is to vote next week on \
a repair plan that would cost $18.5 million and take until the end of October. Ferries, meanwhile, are running every \
ten minutes and will be free of charge through the weekend.
"""

KOREAN = """\
오늘 아침 서울에는 올해 첫눈이 내렸다. 출근길 시민들은 우산을 쓰거나 모자를 눌러쓴 채 걸음을 재촉했고, \
아이들은 운동장에 나와 작은 눈사람을 만들었다. 기상청은 오후부터 기온이 조금씩 올라 쌓인 눈이 대부분 \
녹겠지만, 밤에는 다시 영하 5도까지 떨어져 길이 얼 수 있다고 내다봤다.

시장에서 채소를 파는 김 씨는 "눈이 오면 손님이 줄어서 걱정이지만, 그래도 첫눈은 반갑다"고 말했다. 근처 \
찻집은 따뜻한 유자차를 찾는 사람들로 하루 종일 붐볐다. 주말에는 맑은 날씨가 이어질 것으로 보인다.
"""

CODE = '''\
import heapq
from dataclasses import dataclass, field


@dataclass(order=True)
class Job:
    due: float
    name: str = field(compare=False)
    retries: int = field(default=3, compare=False)


class Scheduler:
    """Run jobs in the order they fall due; a job that fails is tried again a little later."""

    def __init__(self, clock):
        self.clock = clock
        self.queue: list[Job] = []

    def add(self, name: str, delay: float = 0.0) -> None:
        if delay < 0:
            raise ValueError(f"delay must be >= 0, got {delay}")
        heapq.heappush(self.queue, Job(self.clock() + delay, name))

    def run(self, handlers: dict) -> list[str]:
        done = []
        while self.queue and self.queue[0].due <= self.clock():
            job = heapq.heappop(self.queue)
            try:
                handlers[job.name]()
            except OSError as error:
                job.retries -= 1
                if job.retries == 0:
                    print(f"{job.name}: given up after {error!r}")
                    continue
                job.due += 2 ** (3 - job.retries)
                heapq.heappush(self.queue, job)
            else:
                done.append(job.name)
        return done
'''

MATH = r"""\documentclass{article}
\usepackage{amsmath,amsthm}
\newtheorem{lemma}{Lemma}
\begin{document}
\begin{lemma}
Let $a_1, \dots, a_n > 0$. Then
\begin{equation}
  \left( \prod_{i=1}^{n} a_i \right)^{1/n} \le \frac{1}{n} \sum_{i=1}^{n} a_i ,
\end{equation}
with equality if and only if $a_1 = a_2 = \dots = a_n$.
\end{lemma}
\begin{proof}
Write $A = \frac{1}{n}\sum_i a_i$. Since $e^{x} \ge 1 + x$ for every $x \in \mathbb{R}$, the choice
$x_i = a_i / A - 1$ gives $e^{a_i/A - 1} \ge a_i / A$, and multiplying over $i$,
\[
  1 = \exp\!\Big( \sum_{i=1}^{n} \big( \tfrac{a_i}{A} - 1 \big) \Big) \ge \prod_{i=1}^{n} \frac{a_i}{A}
    = \frac{1}{A^{n}} \prod_{i=1}^{n} a_i .
\]
Taking $n$-th roots proves the claim; equality needs $x_i = 0$ for all $i$. In particular, for $f(x) = x^2 + 3x - 4$
we have $\int_0^1 f(x)\,dx = \frac{1}{3} + \frac{3}{2} - 4 = -\frac{13}{6}$.
\end{proof}
\end{document}
"""

SCIENCE = """\
Photosynthesis stores the energy of sunlight in chemical bonds. In the thylakoid membranes of a chloroplast, pigments \
such as chlorophyll absorb photons and pass their energy to a reaction centre, where electrons are lifted to a higher \
potential. As these electrons move through the transport chain, protons are pumped across the membrane; the gradient \
drives an enzyme that makes adenosine triphosphate. Water replaces the lost electrons, and oxygen is released. In the \
stroma, the Calvin cycle then uses this energy to fix carbon dioxide into sugars, a step catalysed by the enzyme \
rubisco. Because rubisco also binds oxygen, plants in hot, dry climates lose part of what they gain to \
photorespiration, and several lineages have independently evolved mechanisms that concentrate carbon dioxide around \
the enzyme before it acts.
"""

TEXTS = {"news": NEWS, "korean": KOREAN, "code": CODE, "math": MATH, "science": SCIENCE}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.tok_eval", description="Measure the tokenizer.")
    parser.add_argument("--data", default="builtin", metavar="SOURCE",
                        help="builtin or a folder, prepared by scripts.dataset (default: builtin)")
    parser.add_argument("--max-chars", type=float, default=5e6, metavar="N",
                        help="characters of each split to measure on (default: 5e6)")
    return parser.parse_args(argv)


def measure(tokenizer: Tokenizer, domain: str, texts: list[str]) -> dict:
    """Return one row of the table; RuntimeError when a text does not come back."""
    ids, offsets = tokenizer.encode_batch(texts)
    for text, first, last in zip(texts, offsets[:-1], offsets[1:], strict=True):
        if tokenizer.decode(ids[first:last]) != text:
            raise RuntimeError(f"a {domain} text does not come back from its tokens: {text[:60]!r}")
    n_bytes = sum(len(text.encode()) for text in texts)
    return {"Text": domain, "Bytes": n_bytes, "Tokens": len(ids), "Bytes per token": round(n_bytes / len(ids), 3)}


def main(args: argparse.Namespace) -> None:
    if not 1 <= args.max_chars < float("inf"):
        raise UserError(f"--max-chars must be at least 1, got {args.max_chars:g}")
    tokenizer = Tokenizer.load(base_dir() / "tokenizer")
    dataset = open_dataset(args.data)
    rows = [measure(tokenizer, domain, [text]) for domain, text in TEXTS.items()]
    for split in ("train", "val"):
        texts = [text for text in iter_texts(dataset, split, max_chars=int(args.max_chars)) if text]
        if not texts:
            raise UserError(f"the {split} split of {args.data} must hold some text, got none")
        rows.append(measure(tokenizer, f"{dataset.name} {split}", texts))
    print(f"{'text':<24} {'bytes':>12} {'tokens':>12} {'bytes/token':>12}")
    for row in rows:
        print(f"{row['Text']:<24} {row['Bytes']:>12,} {row['Tokens']:>12,} {row['Bytes per token']:>12.3f}")
    Report().section("Tokenizer evaluation", rows)


if __name__ == "__main__":
    run_script(parse_args, main)
