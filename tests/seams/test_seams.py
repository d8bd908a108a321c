"""The mechanism: seams are checked, applied all or none, idempotent and reversible."""

import inspect
import sys
import types
from dataclasses import replace

import pytest

from vllm_balance import seams
from vllm_balance.errors import BalancerError
from vllm_balance.seams import Seam, install, is_installed, uninstall
from vllm_balance.seams.arguments import ARGUMENT_SEAMS, REFUSING_SEAMS
from vllm_balance.seams.cpu import CPU_SEAMS
from vllm_balance.seams.loading import LOADING_SEAMS
from vllm_balance.seams.router import ROUTER_SEAMS
from vllm_balance.seams.server import SERVER_SEAMS

SETS = {
    "arguments": ARGUMENT_SEAMS,
    "refusing": REFUSING_SEAMS,
    "server": SERVER_SEAMS,
    "router": ROUTER_SEAMS,
    "loading": LOADING_SEAMS,
    "cpu": CPU_SEAMS,
    "worker": (*ROUTER_SEAMS, *LOADING_SEAMS, *CPU_SEAMS),
}


def louder(original):
    """Wraps any kind of function: its result comes back with an exclamation mark."""

    def wrapper(*args, **kwargs):
        return original(*args, **kwargs) + "!"

    return wrapper


def seam(name: str, *parameters: str, only_if_missing: bool = False) -> Seam:
    return Seam(
        target=f"a_library:{name}",
        parameters=parameters,
        wrap=louder,
        why="a test",
        delete_when="never",
        only_if_missing=only_if_missing,
    )


METHOD = seam("Speaker.say", "self", "word")
STATIC = seam("Speaker.whisper", "word")
CLASS = seam("Speaker.introduce", "word")
FREE = seam("shout", "word")
INHERITED = seam("Speaker.sing", "word", only_if_missing=True)
FAKE = (METHOD, STATIC, CLASS, FREE, INHERITED)


@pytest.fixture
def library(monkeypatch):
    """A module to wrap things in, new for every test."""
    module = types.ModuleType("a_library")
    monkeypatch.setitem(sys.modules, "a_library", module)
    source = """
class Voice:
    def sing(self, word):
        raise NotImplementedError

class Speaker(Voice):
    def say(self, word, loud=False):
        "Says a word."
        return word

    @staticmethod
    def whisper(word):
        return word

    @classmethod
    def introduce(cls, word):
        return cls.__name__ + word

def shout(word):
    return word
"""
    exec(compile(source, "a_library", "exec"), module.__dict__)
    yield module
    uninstall(FAKE)


def namespaces(wanted) -> list:
    """What stands in the namespaces of the seams' owners; None where it is inherited."""
    found = []
    for each in wanted:
        owner, name = each.owner()
        found.append(vars(owner).get(name))
    return found


def test_each_kind_of_function_is_wrapped_and_keeps_its_kind(library):
    install((METHOD, STATIC, CLASS, FREE))
    speaker = library.Speaker()
    assert speaker.say("a") == "a!"
    assert speaker.whisper("b") == library.Speaker.whisper("b") == "b!"
    assert speaker.introduce("c") == library.Speaker.introduce("c") == "Speakerc!"
    assert library.shout("d") == "d!"
    assert library.Speaker.say.__name__ == "say"
    assert library.Speaker.say.__doc__ == "Says a word."
    assert list(inspect.signature(library.Speaker.say).parameters) == ["self", "word", "loud"]


def test_uninstall_restores_the_very_same_objects(library):
    before = namespaces(FAKE)
    install(FAKE)
    assert all(new is not old for new, old in zip(namespaces(FAKE), before, strict=True))
    assert all(map(is_installed, FAKE))
    uninstall(FAKE)
    assert all(new is old for new, old in zip(namespaces(FAKE), before, strict=True))
    assert not any(map(is_installed, FAKE))
    uninstall(FAKE)


def test_installing_again_changes_nothing(library):
    install(FAKE)
    once = namespaces(FAKE)
    install(FAKE)
    assert all(new is old for new, old in zip(namespaces(FAKE), once, strict=True))
    assert library.shout("a") == "a!"


def test_a_seam_that_is_missing_gets_its_place_and_leaves_it_again(library):
    install((INHERITED,))
    assert "sing" in vars(library.Speaker) and "sing" not in vars(seams)
    uninstall((INHERITED,))
    assert "sing" not in vars(library.Speaker)
    with pytest.raises(NotImplementedError):
        library.Speaker().sing("a")


def test_a_fix_that_upstream_has_made_is_left_alone(library):
    library.Speaker.sing = own = lambda self, word: word
    assert INHERITED.problem() is None and not INHERITED.applies()
    install((INHERITED, FREE))
    assert vars(library.Speaker)["sing"] is own
    assert not is_installed(INHERITED) and is_installed(FREE)


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (seam("Speaker.yell", "word"), "a_library:Speaker.yell does not exist in this vLLM"),
        (seam("Writer.say", "word"), "a_library:Writer.say does not exist in this vLLM"),
        (seam("Speaker.say", "word", "pitch"), "has no parameter pitch; it has self, word, loud"),
        (seam("Speaker.sing", "tune", only_if_missing=True), "has no parameter tune"),
    ],
)
def test_one_bad_seam_and_nothing_changes(library, bad, problem):
    good = (STATIC, FREE)
    before = namespaces(good)
    with pytest.raises(BalancerError) as raised:
        install((STATIC, bad, FREE))
    assert problem in str(raised.value)
    assert "Nothing was changed" in str(raised.value)
    assert "vllm-balance doctor" in str(raised.value)
    assert all(new is old for new, old in zip(namespaces(good), before, strict=True))
    assert not any(map(is_installed, (*good, bad)))


def test_a_wrapper_that_cannot_be_made_takes_back_those_before_it(library):
    def breaks(original):
        raise ImportError("no module named colour")

    wanted = (METHOD, INHERITED, replace(STATIC, wrap=breaks), FREE)
    install((FREE,))
    before = namespaces(wanted)
    with pytest.raises(ImportError, match="no module named colour"):
        install(wanted)
    assert all(new is old for new, old in zip(namespaces(wanted), before, strict=True))
    assert "sing" not in vars(library.Speaker)
    assert [each.target for each in wanted if is_installed(each)] == [FREE.target]
    install(FAKE)
    assert library.Speaker().say("a") == "a!" and library.Speaker.whisper("b") == "b!"


def test_all_problems_are_named_at_once(library):
    with pytest.raises(BalancerError, match=r"(?s)Speaker\.yell.*Writer\.say"):
        install((seam("Speaker.yell"), FREE, seam("Writer.say")))


def test_a_module_that_is_not_there():
    gone = Seam(target="no_such_library:f", parameters=(), wrap=louder, why="-", delete_when="-")
    assert "no_such_library:f does not exist in this vLLM" in gone.problem()


def test_a_function_that_somebody_else_replaced_is_refused(library):
    def patched_by_another_plugin(self, word):
        return word

    library.Speaker.say = patched_by_another_plugin
    with pytest.raises(BalancerError, match=r"already replaced by .*patched_by_another_plugin"):
        install((METHOD, FREE))
    assert vars(library.Speaker)["say"] is patched_by_another_plugin
    assert not is_installed(FREE)


def test_a_seam_that_only_adds_goes_around_the_wrapper_of_another_plugin(library):
    original = library.Speaker.say

    def shouted(*args, **kwargs):
        return original(*args, **kwargs).upper()

    library.Speaker.say = shouted
    wraps_wrapped = replace(METHOD, may_be_wrapped=True)
    install((wraps_wrapped,))
    assert library.Speaker().say("a") == "A!"
    uninstall((wraps_wrapped,))
    assert vars(library.Speaker)["say"] is shouted


def test_a_wrapper_of_another_plugin_that_drops_a_parameter_is_refused(library):
    library.Speaker.say = lambda self: "a"
    with pytest.raises(BalancerError, match=r"Speaker\.say has no parameter word; it has self"):
        install((replace(METHOD, may_be_wrapped=True),))


@pytest.mark.parametrize("name", SETS)
def test_vllms_places_are_all_there(name):
    for each in SETS[name]:
        assert each.problem() is None, each.target
        assert each.applies(), each.target
        assert each.why and each.delete_when


@pytest.mark.parametrize("name", SETS)
def test_every_set_is_idempotent_and_reversible(name):
    before = namespaces(SETS[name])
    install(SETS[name])
    once = namespaces(SETS[name])
    assert all(new is not old for new, old in zip(once, before, strict=True))
    assert all(map(is_installed, SETS[name]))
    assert all(each.problem() is None for each in SETS[name]), "refuses what it did itself"
    install(SETS[name])
    assert all(new is old for new, old in zip(namespaces(SETS[name]), once, strict=True))
    uninstall(SETS[name])
    assert all(new is old for new, old in zip(namespaces(SETS[name]), before, strict=True))


@pytest.mark.parametrize("name", SETS)
def test_every_set_is_atomic(name):
    before = namespaces(SETS[name])
    bad = Seam(
        target="vllm.engine.arg_utils:EngineArgs.does_not_exist",
        parameters=(),
        wrap=louder,
        why="-",
        delete_when="-",
    )
    with pytest.raises(BalancerError, match=r"EngineArgs\.does_not_exist"):
        install((*SETS[name], bad))
    assert all(new is old for new, old in zip(namespaces(SETS[name]), before, strict=True))


@pytest.mark.parametrize("name", SETS)
def test_wrappers_keep_the_parameters_that_callers_see(name):
    for each in SETS[name]:
        owner, attribute = each.owner()
        before = inspect.signature(getattr(owner, attribute))
        install((each,))
        assert inspect.signature(getattr(owner, attribute)) == before, each.target


def test_a_target_is_wrapped_by_one_seam_of_a_set():
    for wanted in SETS.values():
        targets = [each.target for each in wanted]
        assert len(set(targets)) == len(targets)
