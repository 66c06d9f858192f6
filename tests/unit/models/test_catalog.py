import pytest

from lltm_ray.errors import ConfigError
from lltm_ray.models.catalog import KINDS, load_catalog, parse_catalog

GOOD = """
[m]
repo = "a/b"
file = "m.gguf"
licence = "mit"
parameters = 1
architecture = "llama"
context = 512
"""


def test_the_catalogue_has_chat_embedding_and_reranking_models():
    catalog = load_catalog()
    kinds = [entry.kind for entry in catalog.values()]
    assert {kind: kinds.count(kind) for kind in KINDS} == {"chat": 56, "embedding": 5, "reranker": 3}


def test_every_name_is_that_of_its_entry_and_ends_in_its_quantization():
    for name, entry in load_catalog().items():
        assert entry.name == name
        assert name.rsplit("-", 1)[1] in entry.file.lower()


def test_no_two_names_mean_the_same_file():
    files = [(entry.repo, entry.file) for entry in load_catalog().values()]
    assert len(set(files)) == len(files)


def test_models_are_of_the_sizes_promised():
    sizes = [entry.parameters for entry in load_catalog().values() if entry.kind == "chat"]
    assert all(10**8 < size < 15 * 10**9 for size in sizes)


def test_the_catalogue_is_read_once_and_cannot_be_changed():
    assert load_catalog() is load_catalog()
    with pytest.raises(TypeError):
        load_catalog()["x"] = None


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (("m.gguf", "../m.gguf"), "m.file"),
        (("m.gguf", "m.bin"), "m.file"),
        (('"a/b"', '"b"'), "m.repo"),
        (('"a/b"', '"../b"'), "m.repo"),
        (("parameters = 1", "parameters = -1"), "m.parameters"),
        (("context = 512", 'context = "512"'), "m.context"),
        (("context = 512", 'context = 512\nkind = "image"'), "m.kind"),
        (("context = 512", 'context = 512\nsha256 = "abc"'), "m.sha256"),
        (("context = 512", "context = 512\nsize = 1"), "m.size"),
        (('licence = "mit"', ""), "m.licence"),
        (("[m]", "[M]"), "M.name"),
        (("[m]", "m = 1\n[n]"), "m"),
        (("[m]", "[m"), "catalog"),
    ],
)
def test_a_wrong_entry_is_refused_by_its_field(change, field):
    assert len(parse_catalog(GOOD)) == 1
    with pytest.raises(ConfigError) as caught:
        parse_catalog(GOOD.replace(*change))
    assert caught.value.field == field
