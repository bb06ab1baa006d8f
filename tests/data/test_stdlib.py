"""The standard library as documents."""

import ast
import platform

import pytest

from data import stdlib
from data.load import load_documents
from shared.errors import ConfigError

MODULE = '''\
import functools

def plain(a, b=1):
    """Add."""
    return a + b

class C:
    @functools.cache
    async def method(self, é="é"):
        """Two

        lines."""  # a comment

        if self:

            return "x"
        return (yield)

    def undocumented(self):
        return 1

    def only_doc(self):
        """No body."""

    class Inner:
        def deep(self): "one line"; return 2

    def left(self):
        """Its string starts left of it."""
        return """
left"""

if True:
    def outer():
        """Outer."""
        def inner():
            """Inner."""
            return 1
        return inner
'''


@pytest.fixture
def library(tmp_path):
    """A library of one module under a name that falls in `train`."""
    assert stdlib.split_of("sample") == "train"
    (tmp_path / "sample.py").write_bytes(MODULE.replace("\n", "\r\n").encode())
    return tmp_path


def test_one_document_per_documented_function(library):
    found = {d.id: (d.prompt, d.completion) for d in stdlib.read_split("train", library)}
    assert found == {
        "sample:plain:3": ('def plain(a, b=1):\n    """Add."""', "\n    return a + b\n"),
        "sample:C.method:9": (
            '@functools.cache\nasync def method(self, é="é"):\n    """Two\n\n    lines."""',
            '  # a comment\n\n    if self:\n\n        return "x"\n    return (yield)\n',
        ),
        "sample:C.Inner.deep:26": ('def deep(self): "one line"', "; return 2\n"),
        "sample:outer:34": (
            'def outer():\n    """Outer."""',
            '\n    def inner():\n        """Inner."""\n        return 1\n    return inner\n',
        ),
    }


def test_skipped_folders_broken_files_and_duplicates(library):
    for name in (
        "test/a.py",
        "pkg/tests/a.py",
        "site-packages/a.py",
        "idlelib/a.py",
        "lib2to3/a.py",
        "turtledemo/a.py",
    ):
        path = library / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'def skipped():\n    """{name}"""\n    return 1\n')
    (library / "broken.py").write_text("def f(:\n")
    (library / "not_text.py").write_bytes(b"x = '\xff'\n")
    (library / "twin.py").write_text('def plain(a, b=1):\n\n    """Add."""\n\n    return a  +  b\n')
    found = stdlib.read_split("train", library)
    assert sorted(d.id for d in found) == [
        "sample:C.Inner.deep:26",
        "sample:C.method:9",
        "sample:outer:34",
        "sample:plain:3",
    ]


def test_the_digest_of_the_files_is_of_what_is_read(library):
    digest = stdlib.files_digest(library)
    (library / "sample.txt").write_text("no module")
    (library / "test").mkdir()
    (library / "test/a.py").write_text("x = 1\n")
    assert stdlib.files_digest(library) == digest
    (library / "sample.py").rename(library / "simple.py")
    renamed = stdlib.files_digest(library)
    (library / "simple.py").rename(library / "sample.py")
    assert stdlib.files_digest(library) == digest
    with (library / "sample.py").open("ab") as file:
        file.write(b"\n")
    assert len({digest, renamed, stdlib.files_digest(library)}) == 3


def test_empty_and_unknown_splits(library):
    with pytest.raises(ConfigError, match="no documented functions in the split"):
        stdlib.read_split("test", library)
    with pytest.raises(ConfigError, match="expected: one of: train, validation, test; got: 'dev'"):
        load_documents("stdlib", "dev")


@pytest.fixture(scope="module")
def splits():
    return {split: load_documents("stdlib", split) for split in stdlib.SPLITS}


def test_the_interpreters_own_library(splits):
    sizes = {split: len(found.documents) for split, found in splits.items()}
    assert 0.8 < sizes["train"] / sum(sizes.values()) < 0.97
    assert sizes["validation"] > 100
    assert sizes["test"] > 100
    for found in splits.values():
        assert (found.name, found.license, found.revision) == ("stdlib", "PSF-2.0", platform.python_version())
        for document in found.documents:
            (function,) = ast.parse(document.prompt + document.completion).body
            assert ast.get_docstring(function) is not None
            assert document.prompt == document.prompt.rstrip()
            assert document.completion.endswith("\n")
            assert "\r" not in document.prompt + document.completion


def test_no_module_id_or_text_is_in_two_splits(splits):
    documents = [(split, d) for split, found in splits.items() for d in found.documents]
    assert len({d.id for _, d in documents}) == len(documents)
    assert len({" ".join((d.prompt + d.completion).split()) for _, d in documents}) == len(documents)
    home = {}
    for split, document in documents:
        top = document.id.partition(":")[0].partition(".")[0]
        assert home.setdefault(top, split) == split


def test_a_second_read_and_a_limited_one_agree(splits):
    again = load_documents("stdlib", "test", limit_docs=50)
    assert again.documents == splits["test"].documents[:50]
    assert len({d.id.partition(":")[0] for d in again.documents}) >= 5
