"""Real English for the demo model, found in every Python: the standard library's documentation.

Two sources: the language reference that `help()` prints (`pydoc_data.topics`) and the docstrings of
the standard library. They are read from the running Python; nothing is stored in the repository.
"""

import ast
import random
import re
import sysconfig
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from pydoc_data.topics import topics

TEXT_END = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
QUESTIONS = (
    "What is {name}?",
    "What does {name} do?",
    "Please explain {name}.",
    "Tell me about {name}.",
)
SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo"}
# A paragraph is prose if it starts like a sentence, ends like one, and is nearly all letters.
SENTENCE = re.compile(r"[A-Z].{50,}[.?!]", re.DOTALL)
MIN_LETTERS = 0.93


def prose(text: str) -> list[str]:
    """The paragraphs of `text` that read as English, white space collapsed."""
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return [p for p in paragraphs if SENTENCE.fullmatch(p) and _letters(p) > MIN_LETTERS]


def _letters(text: str) -> float:
    """The fraction of characters that are letters, spaces, commas or full stops."""
    return sum(c.isalpha() or c in " ,." for c in text) / len(text)


def docstrings() -> Iterator[tuple[str, str]]:
    """(dotted name, docstring) of everything documented in the standard library, in path order."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        module = path.relative_to(root).with_suffix("")
        if SKIPPED_FOLDERS.isdisjoint(module.parts):
            yield from _docstrings_of(path, ".".join(module.parts).removesuffix(".__init__"))


def _docstrings_of(path: Path, module: str) -> Iterator[tuple[str, str]]:
    tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield f"{module}.{node.name}" if hasattr(node, "name") else module, text


def documents(seed: int, max_characters: int | None = None) -> list[str]:
    """Shuffled training documents: plain prose, and the same facts as questions and answers.

    At most max_characters in all, by default everything there is. Each document ends with
    TEXT_END; a chat has the exact form that CHAT_TEMPLATE renders.
    """
    rng = random.Random(seed)
    found = [f"{text}{TEXT_END}" for topic in topics.values() if (text := "\n".join(prose(topic)))]
    for name, docstring in docstrings():
        paragraphs = prose(docstring)
        if paragraphs:
            found.append("\n".join(paragraphs) + TEXT_END)
            if not name.rsplit(".", 1)[-1].startswith("_"):
                question = rng.choice(QUESTIONS).format(name=name)
                found.append(_turn("user", question) + _turn("assistant", paragraphs[0]) + TEXT_END)
    rng.shuffle(found)
    if max_characters is None:
        return found
    total = accumulate(map(len, found))
    return [
        text for text, characters in zip(found, total, strict=True) if characters <= max_characters
    ]


def _turn(role: str, content: str) -> str:
    return f"{TURN_START}{role}\n{content}{TURN_END}\n"
