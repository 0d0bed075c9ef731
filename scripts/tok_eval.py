"""Measure the tokenizer's compression beside GPT-2's and GPT-4's: python -m scripts.tok_eval --data builtin

UTF-8 bytes per token, total over total, by kind of text: the training and validation documents and ten short texts of
this file, which no training data holds. Every text must come back exactly as it went in.
"""

import argparse

import tiktoken

from nanochat import peers
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

CHINESE = """\
清晨的雾气还没有散去，码头上已经响起了卸货的声音。老陈把一筐筐鲜鱼搬上三轮车，准备赶在七点以前送到城东的市场。\
他说，今年的鱼价比去年涨了百分之十二，可是柴油也贵了，算下来赚得并不多。

下午，镇上的小学举行了一场关于海洋的讲座。孩子们围着一块鲸鱼的骨头问个不停：它有多重？它活了多少年？讲座的老师笑着\
回答：“有些问题，科学家也还在寻找答案。”
"""

JAPANESE = """\
駅前の古い本屋が、来月いっぱいで店を閉めることになった。店主の山本さん（72歳）は「四十年も続けられたのは、\
毎日のように立ち寄ってくれたお客さんのおかげです」と話す。棚にはまだ三千冊ほどの本が残っていて、週末には半額で売られる。

閉店の知らせを聞いて、遠くの町から訪ねてくる人も少なくない。大学生のころに通っていたという女性は、当時買えなかった\
画集をようやく手に入れ、うれしそうにページをめくっていた。
"""

RUSSIAN = """\
Вчера вечером над городом прошла сильная гроза. Ветер повалил несколько деревьев на набережной, и две улицы на час \
остались без света. К полуночи аварийные бригады восстановили подачу электричества, а утром рабочие уже убирали \
сломанные ветки и чинили крышу старого театра.

«Я живу здесь тридцать лет и такого ливня не помню», — рассказала Анна Сергеевна, хозяйка небольшой пекарни. Вода \
залила подвал, но печи уцелели, поэтому в восемь часов в лавке, как всегда, пахло свежим хлебом.
"""

ARABIC = """\
افتُتحت صباح اليوم مكتبة جديدة في وسط المدينة القديمة، وتضم أكثر من عشرين ألف كتاب في الأدب والعلوم والتاريخ. وقالت \
مديرة المكتبة إن القاعة الكبرى ستبقى مفتوحة حتى العاشرة ليلاً، وإن الدخول مجاني للطلاب طوال العام.

وفي المساء اجتمع عدد من سكان الحي حول فنجان من القهوة، يتحدثون عن ذكرياتهم مع المبنى الذي كان مدرسةً قبل نحو ٦٠ عاماً. \
قال أحدهم مبتسماً: «هنا تعلمت القراءة، وهنا سيتعلمها أحفادي».
"""

HINDI = """\
पहाड़ी गाँव में इस साल सेब की फ़सल बहुत अच्छी हुई है। सुबह होते ही किसान टोकरियाँ लेकर बाग़ों में पहुँच जाते हैं और दोपहर तक \
पहला ट्रक मंडी की ओर निकल पड़ता है। पिछले साल ओलों ने आधी फ़सल बिगाड़ दी थी, इसलिए इस बार सबके चेहरों पर ख़ुशी है।

शाम को स्कूल के मैदान में बच्चे क्रिकेट खेलते हैं। बूढ़े लोग पीपल के नीचे बैठकर मौसम और दामों की बातें करते हैं। उनमें से एक ने \
कहा, "अगर सड़क ठीक हो जाए, तो हमारा सेब दो दिन पहले शहर पहुँच सकता है।"
"""

TEXTS = {"news": NEWS, "science": SCIENCE, "code": CODE, "math": MATH, "korean": KOREAN, "chinese": CHINESE,
         "japanese": JAPANESE, "russian": RUSSIAN, "arabic": ARABIC, "hindi": HINDI}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.tok_eval", description="Measure the tokenizer.")
    parser.add_argument("--data", default="builtin", metavar="SOURCE",
                        help="builtin, fineweb-edu (the shards that are here) or a folder, prepared by scripts.dataset "
                             "(default: builtin)")
    parser.add_argument("--max-chars", type=float, default=5e6, metavar="N",
                        help="characters of each split to measure on (default: 5e6)")
    return parser.parse_args(argv)


def open_peers() -> tuple[dict[str, tiktoken.Encoding | None], list[str]]:
    """Return GPT-2 and GPT-4, None for one that is not there, and a sentence for each of those."""
    found, notes = {}, []
    for name in peers.VOCABULARIES:
        try:
            found[name] = peers.encoding(name)
        except UserError as error:
            found[name] = None
            notes.append(str(error))
    return found, notes


def count(tokenizer: Tokenizer, domain: str, texts: list[str]) -> int:
    """Return the tokens of `texts`; RuntimeError when a text does not come back from them."""
    ids, offsets = tokenizer.encode_batch(texts)
    for text, first, last in zip(texts, offsets[:-1], offsets[1:], strict=True):
        if tokenizer.decode(ids[first:last]) != text:
            raise RuntimeError(f"a {domain} text does not come back from its tokens: {text[:60]!r}")
    return len(ids)


def count_peer(encoding: tiktoken.Encoding, texts: list[str]) -> int | None:
    """Return the tokens of `texts`, None when the peer cannot encode one: its regular expressions run out of stack on
    a million spaces. RuntimeError when a text does not come back."""
    total = 0
    for text in texts:
        try:
            ids = encoding.encode(text, disallowed_special=())  # the names of special tokens are ordinary text
        except ValueError:
            return None
        if encoding.decode(ids) != text:
            raise RuntimeError(f"a text does not come back from the tokens of {encoding.name}: {text[:60]!r}")
        total += len(ids)
    return total


def measure(tokenizer: Tokenizer, others: dict[str, tiktoken.Encoding | None], domain: str, texts: list[str]) -> dict:
    """Return one row: bytes per token of ours and of each peer, and by how much ours is better (+) or worse (-)."""
    n_bytes, tokens = sum(len(text.encode()) for text in texts), count(tokenizer, domain, texts)
    row = {"Text": domain, "Bytes": n_bytes, "Tokens": tokens, "Ours": round(n_bytes / tokens, 3)}
    for name, encoding in others.items():
        theirs = count_peer(encoding, texts) if encoding else None
        row[name] = round(n_bytes / theirs, 3) if theirs else "failed" if encoding else "not installed"
        row[f"vs {name}"] = f"{100 * (theirs / tokens - 1):+.1f} %" if theirs else "-"
    return row


def verdicts(rows: list[dict], names: list[str]) -> dict[str, str]:
    """Return for each peer where ours has more bytes per token and where fewer."""
    said = {}
    for name in names:
        percents = {row["Text"]: row[f"vs {name}"] for row in rows if row[f"vs {name}"] != "-"}
        if percents:
            better, worse = ([text for text, percent in percents.items()
                              if percent.startswith(sign) and percent[1:] != "0.0 %"] for sign in "+-")
            said[f"Against {name}"] = (f"better on {', '.join(better) or 'no text'}; "
                                       f"worse on {', '.join(worse) or 'no text'}")
    return said


def show(row: dict) -> str:
    """Return a row of the table for the terminal."""
    text, *cells = (f"{cell:,}" if isinstance(cell, int) else f"{cell:.3f}" if isinstance(cell, float) else cell
                    for cell in row.values())
    return f"{text:<24}" + "".join(f" {cell:>13}" for cell in cells)


def main(args: argparse.Namespace) -> None:
    if not 1 <= args.max_chars < float("inf"):
        raise UserError(f"--max-chars must be at least 1, got {args.max_chars:g}")
    tokenizer = Tokenizer.load(base_dir() / "tokenizer")
    dataset = open_dataset(args.data)
    documents = {}
    for split in ("train", "val"):
        texts = [text for text in iter_texts(dataset, split, max_chars=int(args.max_chars)) if text]
        if not texts:
            raise UserError(f"the {split} split of {args.data} must hold some text, got none")
        documents[f"{dataset.name} {split}"] = texts
    others, notes = open_peers()
    rows = [measure(tokenizer, others, domain, texts)
            for domain, texts in ({domain: [text] for domain, text in TEXTS.items()} | documents).items()]

    sizes = {"Vocabulary, ours": tokenizer.vocab_size} | {
        f"Vocabulary, {name}": encoding.n_vocab for name, encoding in others.items() if encoding}
    facts = sizes | verdicts(rows, list(others)) | ({"Note": "; ".join(notes)} if notes else {})
    print("UTF-8 bytes per token\n" + show({name: name for name in rows[0]}))
    for row in rows:
        print(show(row))
    for name, fact in facts.items():
        print(f"{name}: {fact:,}" if isinstance(fact, int) else f"{name}: {fact}")
    Report().section("Tokenizer evaluation", facts | {"UTF-8 bytes per token": rows})


if __name__ == "__main__":
    run_script(parse_args, main)
