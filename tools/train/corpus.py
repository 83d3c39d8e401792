"""The standard library's source, read once: training documents, held-out documents, words, passages, functions.

In: a directory of Python source (by default the running interpreter's standard library) or a .tar.gz of one.
Out: a `Corpus` of text. It knows nothing of tokens, chat or training. The source is Python's own, under the
PSF licence; site-packages is never read. A file belongs to the held-out split by the hash of its path alone,
so that every machine makes the same split.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
import tarfile
import textwrap
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_PERCENT = 4
LICENCE = "Python Software Foundation License 2.0 (the standard library's source and docstrings)"
_SKIP_PARTS = {"site-packages", "dist-packages", "__pycache__", "encodings", "__phello__", "test_lib2to3"}
_MAX_CHARS = 400_000


@dataclass(frozen=True, kw_only=True)
class Function:
    """One documented function: its qualified name, its source without the docstring's indent, its first sentence."""

    module: str
    name: str
    source: str
    summary: str
    public: bool


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Text of one split. `files` maps a path inside the standard library to its source."""

    files: dict[str, str]
    held_out: bool

    def snippets(self) -> list[str]:
        """Top-level functions and classes and methods, each as a document of its own, short ones only."""
        found: list[str] = []
        for text in self.files.values():
            for node, _ in _definitions(text):
                source = _source(text, node)
                if 80 <= len(source) <= 6000:
                    found.append(source)
        return found

    def functions(self) -> list[Function]:
        """Documented functions outside the test suite, by path and then by line."""
        found: list[Function] = []
        for path, text in self.files.items():
            if path.startswith(("test/", "idlelib/", "lib2to3/")):
                continue
            module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            for node, owner in _definitions(text):
                if isinstance(node, ast.ClassDef):
                    continue
                summary = first_sentence(ast.get_docstring(node) or "")
                source = _source(text, node)
                if summary and len(source) <= 1800:
                    name = f"{owner}.{node.name}" if owner else node.name
                    public = not any(part.startswith("_") for part in (*module.split("."), node.name))
                    found.append(Function(module=module, name=name, source=source, summary=summary, public=public))
        return found

    def passages(self) -> list[str]:
        """Paragraphs of English out of docstrings, on one line each."""
        found: dict[str, None] = {}
        for path, text in self.files.items():
            if path.startswith("test/"):
                continue
            for quoted in re.findall(r'"""(.*?)"""', text, flags=re.DOTALL):
                for paragraph in textwrap.dedent(quoted).split("\n\n"):
                    line = " ".join(paragraph.split())
                    if 40 <= len(line) <= 600 and _is_prose(line):
                        found[line] = None
        return list(found)

    def code_lines(self) -> list[str]:
        """Blocks of 2 to 12 consecutive non-blank source lines, dedented."""
        found: dict[str, None] = {}
        for path, text in self.files.items():
            if path.startswith("test/"):
                continue
            for block in re.split(r"\n\s*\n", text):
                lines = block.strip("\n").split("\n")
                code = textwrap.dedent("\n".join(lines))
                if 2 <= len(lines) <= 12 and max(map(len, lines)) <= 90 and not code[0].isspace():
                    found[code] = None
        return list(found)

    def words(self) -> list[str]:
        """Lower-case words of 3 to 12 letters, the common first."""
        counts: dict[str, int] = {}
        for text in self.passages():
            for word in re.findall(r"(?<![\w.])[a-z]{3,12}(?![\w(])", text):
                counts[word] = counts.get(word, 0) + 1
        common = {w: n for w, n in counts.items() if n >= 2}
        for text in self.files.values():
            for word in re.findall(r"(?<![\w.'])[a-z]{4,10}(?![\w('])", "\n".join(re.findall(r"#(.*)", text))):
                counts[word] = counts.get(word, 0) + 1
        common |= {w: n for w, n in counts.items() if n >= 8}
        return sorted(common, key=lambda w: (-counts[w], w))


def load(source: Path | None = None, *, held_out: bool = False) -> Corpus:
    """Read one split. `source` is a directory, a .tar.gz made by `pack`, or None for this Python's library."""
    root = source or Path(sysconfig.get_paths()["stdlib"])
    texts = _from_tar(root) if root.is_file() else _from_directory(root)
    chosen = {path: text for path, text in sorted(texts.items()) if is_held_out(path) == held_out}
    if not chosen:
        raise ValueError(f"{root}: no Python source found")
    return Corpus(files=chosen, held_out=held_out)


def is_held_out(path: str) -> bool:
    digest = hashlib.sha256(path.encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT


def pack(target: Path, source: Path | None = None) -> int:
    """Write the files that `load` would read to one .tar.gz, for a machine with another standard library."""
    root = source or Path(sysconfig.get_paths()["stdlib"])
    names = sorted(_from_directory(root))
    with tarfile.open(target, "w:gz") as archive:
        for name in names:
            archive.add(root / name, arcname=name)
    return len(names)


def first_sentence(docstring: str) -> str:
    """The first sentence of a docstring if it reads as one, else the empty string."""
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    sentence = re.split(r"(?<=[.!?])\s", paragraph)[0]
    return sentence if 12 <= len(sentence) <= 200 and _is_prose(sentence) else ""


def _from_directory(root: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for file in root.rglob("*.py"):
        name = file.relative_to(root).as_posix()
        if not _SKIP_PARTS.intersection(name.split("/")):
            _keep(found, name, file.read_bytes())
    return found


def _from_tar(path: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    with tarfile.open(path) as archive:
        for member in archive:
            handle = archive.extractfile(member)
            if handle is not None:
                _keep(found, member.name, handle.read())
    return found


def _keep(found: dict[str, str], name: str, data: bytes) -> None:
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return
    ascii_chars = sum(1 for byte in data if byte < 128)
    longest = max(map(len, text.split("\n")))
    if 40 <= len(text) <= _MAX_CHARS and ascii_chars >= 0.97 * len(data) and longest <= 1000:
        found[name] = text.replace("\r\n", "\n").replace("\t", "    ").replace("\f", "")


type _Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _definitions(text: str) -> list[tuple[_Definition, str]]:
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return []
    found: list[tuple[_Definition, str]] = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.append((node, ""))
        if isinstance(node, ast.ClassDef):
            inner = [n for n in node.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
            found.extend((method, node.name) for method in inner)
    return found


def _source(text: str, node: _Definition) -> str:
    lines = text.split("\n")[node.lineno - 1 : node.end_lineno]
    return textwrap.dedent("\n".join(lines)).rstrip() + "\n"


def _is_prose(line: str) -> bool:
    letters = sum(1 for c in line if c.isalpha() or c == " ")
    return line[0].isupper() and letters >= 0.85 * len(line) and ">>>" not in line and ":param" not in line
