"""Names that users give: whatever a file system, CSV and JSON can hold."""

from hypothesis import strategies as st

AWKWARD = (
    *("Male speech, man speaking", "a,b", ",", "[noise]", '["a", "b"]', "[", '"', "'", 'a"b', '""'),
    *("$", "$$", r"$\nosuch{$", r"\ ", "\\", "|", "`", "``a`", "a|b", "<b>", "*_x_*", "#", "# a"),
    *("=1+1", "-1", "@a", "+a", "0", "none", "nan", "null", "true", "{}", "%s", "{0}", "~"),
    *(" a ", "a\nb", "a\tb", "a\r\nb", "a\rb", "\x1b[31m", "\x7f", "\u2028", "\u00a0", "a;b"),
    *("caf\u00e9", "cafe\u0301", "\u05d0\u05d1", "\u202egnp", "\U0001f600", "\ufeffa", "\ufffd"),
    *("a\udce9", "\udcff", "x" * 200, "class1", "labels", "wav"),
)
CHARACTERS = st.one_of(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"),
    st.sampled_from([chr(0xDC80 + n) for n in range(128)]),  # bytes that are not UTF-8
    st.sampled_from("$,\"'|\\\n\r\t`[]=-@#;*_ "),
)


def _written(name: str) -> str:
    """The name as Python reads it from a disk: surrogates that are UTF-8 together are text."""
    return name.encode(errors="surrogateescape").decode(errors="surrogateescape")


TEXTS = st.one_of(st.sampled_from(AWKWARD), st.text(CHARACTERS, max_size=12)).map(_written)
CLASSES = TEXTS.filter(lambda name: name.strip())
FILES = (
    TEXTS.map(lambda name: name.replace("/", "").replace("\0", ""))
    .filter(lambda name: name.strip() and name not in (".", ".."))
    .filter(lambda name: len(name.encode(errors="surrogateescape")) < 240)
)
