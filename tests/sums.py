"""A tiny text that a tiny model can learn: sums, in words."""

from gptlite.corpus import CharTokenizer, Corpus

TEXT = "".join(f"{a} and {b} make {a + b};\n" for a in range(12) for b in range(12))
VOCABULARY = len(set(TEXT))


def corpus() -> Corpus:
    """The text cut in two, with a tokenizer of its own characters."""
    tokenizer = CharTokenizer(TEXT)
    tokens = tokenizer.encode(TEXT).short()
    return Corpus("sums", tokens[:2000], tokens[2000:], tokenizer)
