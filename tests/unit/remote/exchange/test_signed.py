"""Signed refs: what is believed, and every way in which somebody may cheat who can write to a remote but has no key."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from llmos_cli.errors import Unsafe, UsageError
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.names import RefName, parse_ref
from llmos_cli.formats.signature import Signature, Statement, decode_signature, encode_signature, signed_bytes
from llmos_cli.progress import Silent
from llmos_cli.remote.exchange.clone import execute_clone, plan_clone
from llmos_cli.remote.exchange.pull import PullPlan, execute_pull, plan_pull
from llmos_cli.remote.exchange.push import execute_push, plan_push
from llmos_cli.remote.open import Remote, find_remote, open_transport
from llmos_cli.remote.pool.members import create_pool, open_pool
from llmos_cli.store.handle import Store
from llmos_cli.store.local import open_store, save_config
from llmos_cli.store.refs import keys, signatures
from llmos_cli.store.refs.keys import SigningKey, load_key, new_key
from llmos_cli.store.refs.point import point
from llmos_cli.store.refs.refs import delete_ref
from llmos_cli.store.refs.signatures import EXPIRED, GOOD, UNCHECKED, UNKNOWN, sign_ref, signers

REF = parse_ref("tiny")


@dataclass
class Signing:
    """A signer's store, a remote that anybody may write to, and a reader's store that trusts alice."""

    exchange: Any
    mine: Store
    reader: Store
    alice: SigningKey
    mallory: SigningKey

    @property
    def folder(self) -> Path:
        return Path(self.exchange.folder) / "nas" / "refs" / "tiny" / "latest"

    def files(self) -> list[Path]:
        return sorted(self.folder.glob("*.sig"))

    def publish(self, seed: int, *, sign: SigningKey | None = None, days: float | None = None) -> ObjectId:
        oid: ObjectId = self.exchange.commit(self.mine, "tiny", a=self.exchange.noise(seed, 3000))
        if sign:
            sign_ref(self.mine, REF, sign, days=days)
        self.exchange.push(self.mine, "tiny")
        return oid

    def plan(self, *, force: bool = False, signed: bool = True) -> PullPlan:
        return plan_pull(self.reader, self.exchange.remote(), [REF], force=force, signed=signed)

    def pull(self, **options: bool) -> ObjectId | None:
        execute_pull(self.reader, self.exchange.remote(), self.plan(**options), Silent())
        value: ObjectId | None = self.exchange.value(self.reader, "tiny")
        return value

    def refused(self, match: str) -> None:
        """The pull is refused, and nothing has changed at the reader."""
        before = self.exchange.value(self.reader, "tiny")
        with pytest.raises(Unsafe, match=match):
            self.plan(force=True)
        assert self.exchange.value(self.reader, "tiny") == before

    def rewrite(self, change: Callable[[Signature], Signature], *, sign: SigningKey | None = None) -> None:
        """Change what is said beside the newest move, signed anew with another key or not at all."""
        path = self.files()[-1]
        changed = change(decode_signature(path.read_bytes(), "it"))
        if sign:
            changed = replace(changed, value=sign.sign(signed_bytes(changed.statement)))
        path.write_bytes(encode_signature(changed))


@pytest.fixture
def signing(exchange: Any, tmp_path: Path) -> Signing:
    for name in ("alice", "mallory"):
        new_key(tmp_path / f"{name}.key")
    alice, mallory = (load_key(tmp_path / f"{name}.key") for name in ("alice", "mallory"))
    mine, reader = exchange.store("mine"), exchange.store("reader")
    for store in (mine, reader):
        save_config(store, replace(store.config, trust={"alice": f"ed25519:{alice.public}"}))
    return Signing(exchange, mine, reader, alice, mallory)


def test_a_signed_ref_is_pulled_and_says_by_whom(signing: Signing) -> None:
    oid = signing.publish(1, sign=signing.alice)
    assert signing.pull() == oid
    (signed,) = signers(signing.reader, REF, oid)
    assert (signed.state, signed.name) == (GOOD, "alice")
    assert signing.pull() == oid  # and again, with nothing to do


def test_a_signature_goes_on_to_whoever_clones_from_the_reader(signing: Signing) -> None:
    oid = signing.publish(1, sign=signing.alice)
    signing.pull()
    signing.exchange.push(signing.reader, "tiny", to="mirror")
    third = signing.exchange.store("third")
    save_config(third, signing.reader.config)
    plan = plan_pull(third, signing.exchange.remote("mirror"), None, force=False, signed=True)
    execute_pull(third, signing.exchange.remote("mirror"), plan, Silent())
    assert [item.state for item in signers(third, REF, oid)] == [GOOD]


def test_a_forgery_that_was_pulled_unasked_goes_no_further(signing: Signing) -> None:
    signing.publish(1, sign=signing.alice)
    signing.rewrite(lambda item: replace(item, value=bytes(64)))
    signing.pull(signed=False)
    done = signing.exchange.push(signing.reader, "tiny", to="mirror")
    assert (len(done.refs), done.signed) == (1, 0)


def test_a_value_that_is_there_already_can_be_signed_later(signing: Signing) -> None:
    oid = signing.publish(1)
    sign_ref(signing.mine, REF, signing.alice, days=None)
    done = signing.exchange.push(signing.mine, "tiny")
    assert (done.sent, done.signed) == (0, 1)
    assert signing.exchange.push(signing.mine, "tiny").signed == 0
    assert signing.pull() == oid


def test_the_next_value_must_be_signed_anew(signing: Signing) -> None:
    signing.publish(1, sign=signing.alice)
    signing.pull()
    signing.publish(2)
    signing.refused("tiny:latest at nas is not signed")
    sign_ref(signing.mine, REF, signing.alice, days=None)
    signing.exchange.push(signing.mine, "tiny")
    assert signing.pull() == signing.exchange.value(signing.mine, "tiny")


def test_a_ref_that_was_never_signed_is_refused(signing: Signing) -> None:
    oid = signing.publish(1)
    signing.refused("is not signed")
    assert signing.pull(signed=False) == oid


def test_a_stripped_signature_is_noticed(signing: Signing) -> None:
    signing.publish(1, sign=signing.alice)
    signing.pull()
    for path in signing.files():
        path.unlink()
    signing.refused("is not signed")


def test_a_key_that_is_not_trusted_counts_for_nothing(signing: Signing) -> None:
    oid = signing.publish(1, sign=signing.mallory)
    signing.refused("signed by nobody who is trusted here")
    assert signing.pull(signed=False) == oid
    assert [item.state for item in signers(signing.reader, REF, oid)] == [UNKNOWN]
    sign_ref(signing.mine, REF, signing.alice, days=None)
    signing.exchange.push(signing.mine, "tiny")
    assert signing.pull() == oid  # beside a good one it does no harm


def test_a_signature_in_somebody_elses_name_is_refused(signing: Signing) -> None:
    signing.publish(1, sign=signing.mallory)
    signing.rewrite(lambda item: replace(item, key=signing.alice.public))
    signing.refused("not made with the key that it names")


def test_a_bad_signature_beside_a_good_one_is_refused(signing: Signing) -> None:
    signing.publish(1, sign=signing.alice)
    sign_ref(signing.mine, REF, signing.mallory, days=None)
    signing.exchange.push(signing.mine, "tiny")
    for path in signing.files():
        item = decode_signature(path.read_bytes(), "it")
        if item.key == signing.mallory.public:
            path.write_bytes(encode_signature(replace(item, key=signing.alice.public)))
    signing.refused("not made with the key that it names")


@pytest.mark.parametrize(
    "change",
    [
        lambda item: replace(item, serial=item.serial + 1),
        lambda item: replace(item, time="2036-01-01T00:00:00+00:00"),
        lambda item: replace(item, expires="2036-01-01T00:00:00+00:00"),
        lambda item: replace(item, previous=item.id),
    ],
)
def test_no_word_of_a_statement_can_be_changed(signing: Signing, change: Callable[[Statement], Statement]) -> None:
    signing.publish(1, sign=signing.alice)
    signing.rewrite(lambda item: replace(item, statement=change(item.statement)))
    signing.refused("not made with the key that it names")


def test_a_signature_for_another_manifest_is_refused(signing: Signing) -> None:
    signing.publish(1, sign=signing.alice)
    (first,) = signing.files()
    signing.publish(2)
    shutil.copy(first, signing.folder / first.name.replace("0000000001", "0000000002"))
    signing.refused("it is for @")


def test_a_signature_for_another_ref_is_refused(signing: Signing) -> None:
    oid = signing.publish(1)
    other = RefName("other")
    point(signing.mine, other, oid, expected=None, message="")
    sign_ref(signing.mine, other, signing.alice, days=None)
    signing.exchange.push(signing.mine, "other")
    (path,) = signing.folder.parent.parent.glob("other/latest/*.sig")
    shutil.copy(path, signing.folder / path.name)
    signing.refused("it is for other:latest")


@pytest.mark.parametrize("data", [b"", b"{}\n", b"not json\n", b'{"version":2}\n', b"x" * 5000])
def test_what_is_no_signature_is_refused(signing: Signing, data: bytes) -> None:
    signing.publish(1, sign=signing.alice)
    (path,) = signing.files()
    (signing.folder / f"0000000001.{'0' * 32}.sig").write_bytes(data)
    signing.refused("a signature that is not good")
    assert path.exists()


def test_more_signatures_than_anybody_needs_are_refused(signing: Signing) -> None:
    signing.publish(1, sign=signing.alice)
    for number in range(40):
        (signing.folder / f"0000000001.{number:032x}.sig").write_bytes(b"")
    signing.refused("41 signatures")


def test_an_expired_signature_is_refused_and_can_be_renewed(signing: Signing, monkeypatch: pytest.MonkeyPatch) -> None:
    oid = signing.publish(1, sign=signing.alice, days=1)
    assert signing.pull() == oid
    later = datetime.now(UTC) + timedelta(days=2)

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return later

    monkeypatch.setattr(signatures, "datetime", Clock)
    signing.refused("was signed until .*, which is over")
    assert [item.state for item in signers(signing.reader, REF, oid)] == [EXPIRED]
    sign_ref(signing.mine, REF, signing.alice, days=1)
    signing.exchange.push(signing.mine, "tiny")
    assert signing.pull() == oid


def test_an_earlier_value_with_its_good_signature_is_refused(signing: Signing) -> None:
    """The remote is set back, whole, to what it was: every byte of it is genuine."""
    old = signing.publish(1, sign=signing.alice)
    kept = signing.folder.with_name("kept")
    shutil.copytree(signing.folder, kept)
    signing.publish(2, sign=signing.alice)
    new = signing.pull()
    assert new != old
    shutil.rmtree(signing.folder)
    kept.rename(signing.folder)
    signing.refused("is an earlier value: signed as number 1, and number 2")
    with pytest.raises(Unsafe, match="is an earlier value"):
        signing.plan()


def test_an_earlier_value_made_anew_is_refused(signing: Signing) -> None:
    """The same, but as a move that comes after all others."""
    old = signing.publish(1, sign=signing.alice)
    (first,) = signing.files()
    forger = signing.exchange.store("forger")
    signing.exchange.pull(forger, "tiny")
    signing.publish(2, sign=signing.alice)
    new = signing.pull()
    signing.exchange.pull(forger, "tiny")
    point(forger, REF, old, expected=new, message="set back")
    signing.exchange.push(forger, "tiny", force=True)
    shutil.copy(first, signing.folder / first.name.replace("0000000001", "0000000003"))
    signing.refused("is an earlier value")


def test_the_signer_may_go_back(signing: Signing) -> None:
    old = signing.publish(1, sign=signing.alice)
    signing.publish(2, sign=signing.alice)
    new = signing.pull()
    point(signing.mine, REF, old, expected=new, message="the new one was no good")
    sign_ref(signing.mine, REF, signing.alice, days=None)
    signing.exchange.push(signing.mine, "tiny")
    assert signing.pull() == old


def test_a_second_machine_of_the_signer_goes_on_counting(signing: Signing) -> None:
    for seed in (1, 2, 3):
        signing.publish(seed, sign=signing.alice)
    signing.pull()
    assert sign_ref(signing.reader, REF, signing.alice, days=None).serial == 4


def test_nobody_trusted_nothing_pulled(signing: Signing) -> None:
    signing.publish(1, sign=signing.alice)
    save_config(signing.reader, replace(signing.reader.config, trust={}))
    signing.refused("no key is trusted here")


@pytest.mark.parametrize("names", [("nas",), ("*",)])
def test_settings_can_ask_for_it(signing: Signing, names: tuple[str, ...]) -> None:
    signing.publish(1)
    url = {"nas": str(signing.exchange.folder / "nas")}
    save_config(signing.reader, replace(signing.reader.config, remotes=url, require_signed=names))
    with pytest.raises(Unsafe, match="is not signed"):
        signing.plan(signed=False)
    by_url = replace(signing.exchange.remote(), name=None)
    with pytest.raises(Unsafe, match="is not signed"):
        plan_pull(signing.reader, by_url, [REF], force=False)


def test_another_remote_is_not_asked_for_it(signing: Signing) -> None:
    oid = signing.publish(1)
    save_config(signing.reader, replace(signing.reader.config, remotes={"b": "/b"}, require_signed=("b",)))
    assert signing.pull(signed=False) == oid


def test_a_store_with_signatures_is_sound_and_forgets_them_with_the_ref(signing: Signing) -> None:
    oid = signing.publish(1, sign=signing.alice)
    assert signing.exchange.problems(signing.mine) == []
    assert signing.exchange.leftovers("mine") == []
    delete_ref(signing.mine, REF, expected=oid)
    assert not list(signing.mine.refs.rglob("*.sig"))


def test_keys_are_private_and_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "a.key"
    public = new_key(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert f"ed25519:{load_key(path).public}" == public
    with pytest.raises(Unsafe, match="never overwritten"):
        new_key(path)
    for mode in (0o640, 0o604, 0o660):
        path.chmod(mode)
        with pytest.raises(Unsafe, match="can be read by others"):
            load_key(path)


def test_what_is_no_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.key"
    path.write_bytes(b"hello")
    path.chmod(0o600)
    with pytest.raises(UsageError, match="no private key that can be read"):
        load_key(path)


def test_without_the_package_nothing_is_believed(signing: Signing, monkeypatch: pytest.MonkeyPatch) -> None:
    oid = signing.publish(1, sign=signing.alice)
    signing.pull(signed=False)
    monkeypatch.setattr(keys, "find_spec", lambda name: None if name == "cryptography" else find_spec(name))
    with pytest.raises(UsageError) as caught:
        signing.plan()
    assert caught.value.hint == "pip install 'llmos[sign]'"
    assert signing.pull(signed=False) == oid
    assert [item.state for item in signers(signing.reader, REF, oid)] == [UNCHECKED]


def test_a_pool_keeps_signatures_where_it_keeps_refs(signing: Signing, tmp_path: Path) -> None:
    urls = [str(tmp_path / f"node{number}") for number in range(3)]

    def pool() -> Remote:
        return Remote("pool", open_pool(urls, open_transport, lambda message: None))

    create_pool(urls, 2, open_transport, lambda message: None)
    oid = signing.exchange.commit(signing.mine, "tiny", a=signing.exchange.noise(1, 3000))
    sign_ref(signing.mine, REF, signing.alice, days=None)
    remote = pool()
    assert execute_push(signing.mine, remote, plan_push(signing.mine, remote, [REF], force=False), Silent()).signed == 1
    shutil.rmtree(urls[0])
    remote = pool()
    execute_pull(signing.reader, remote, plan_pull(signing.reader, remote, [REF], force=False, signed=True), Silent())
    assert [item.state for item in signers(signing.reader, REF, oid)] == [GOOD]


def test_a_clone_takes_only_what_is_signed_and_goes_on_so(signing: Signing, tmp_path: Path) -> None:
    def clone(name: str, *keys: SigningKey) -> Path:
        trusted = [f"ed25519:{key.public}" for key in keys]
        plan = plan_clone("nas", Path(name), tmp_path, Silent(), trusted)
        execute_clone(plan, Silent())
        return plan.root

    oid = signing.publish(1, sign=signing.alice)
    with pytest.raises(Unsafe, match="signed by nobody who is trusted here"):
        clone("first", signing.mallory)
    with pytest.raises(UsageError, match="not a public key"):
        plan_clone("nas", Path("second"), tmp_path, Silent(), ["ed25519:short"])
    assert not (tmp_path / "second").exists()
    with open_store(clone("third", signing.mallory, signing.alice)) as store:
        assert signing.exchange.value(store, "tiny") == oid
        assert store.config.require_signed == ("origin",)
        signing.publish(2)
        with pytest.raises(Unsafe, match="is not signed"):
            plan_pull(store, find_remote(store, "origin", tmp_path), None, force=False)
