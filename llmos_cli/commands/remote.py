"""Name the places that 'push' and 'pull' exchange with.

A remote is a folder (another disk, a mounted file system, another store) or an object store: S3, Ceph and their like,
Google Cloud Storage, Azure. It is kept in the store's config.toml; credentials are not, they come from the environment.

Examples:
  llmos remote add nas /mnt/nas/models
  llmos remote add team --pool --replicas 2 /mnt/a /mnt/b /mnt/c
  llmos remote ls
  llmos remote rm nas
"""

from typing import TYPE_CHECKING, Annotated

import typer

from llmos_cli.errors import Damaged, PartlyDone, UsageError
from llmos_cli.ui.pools import (
    describe_heal,
    describe_health,
    describe_pool,
    lost_words,
    show_damage,
    show_heal,
    show_health,
    show_pool,
)
from llmos_cli.ui.session import session
from llmos_cli.ui.text import plural, size

if TYPE_CHECKING:
    from llmos_cli.remote.pool.pools import PoolRemote

NameArgument = Annotated[str, typer.Argument(metavar="REMOTE", help="What to call it.", show_default=False)]
PoolArgument = Annotated[str, typer.Argument(metavar="REMOTE", help="A pool's name, or its URL.", show_default=False)]


def add(
    ctx: typer.Context,
    name: NameArgument,
    urls: Annotated[
        list[str], typer.Argument(metavar="URL...", help="A folder, or s3:, gs:, az:.", show_default=False)
    ],
    *,
    pool: Annotated[bool, typer.Option("--pool", help="Make a pool of several nodes, with copies.")] = False,
    replicas: Annotated[int, typer.Option("--replicas", metavar="R", min=1, help="Copies of each pack.")] = 2,
) -> None:
    """Give a remote a name.

    The first push makes it. A place that holds something else is refused. Whether an object store keeps two writers
    apart is tried now; where it does not, refs move by way of lock objects there.

    Examples:
      llmos remote add nas /mnt/nas/models
      llmos remote add cloud "s3://bucket/models?endpoint=http://127.0.0.1:7480"
      llmos remote add pool --pool --replicas 2 /mnt/a /mnt/b /mnt/c /mnt/d
    """
    from llmos_cli.remote.probe import LOCKS, READ_ONLY, probe

    here, creates = session(ctx), None
    if len(urls) > 1 and not pool:
        raise UsageError(f"{name} is given {len(urls)} URLs", hint="several nodes make a pool: add --pool")
    with here.open_store() as store:
        if pool:
            from llmos_cli.remote.pool.pools import add_pool

            kept = add_pool(store, name, urls, replicas, here.cwd).pool.url
        else:
            from llmos_cli.remote.open import add_locks, add_remote, open_transport

            kept = add_remote(store, name, urls[0], here.cwd)
            creates = probe(open_transport(kept))
            if creates == LOCKS:
                kept = add_locks(store, name)
    here.out.result({"remote": name, "url": kept, "creates": creates})
    here.out.line(f"{name} is {kept}")
    if creates == LOCKS:
        here.out.warn(f"{kept} does not honour conditional puts: refs move by way of lock objects there")
    if creates == READ_ONLY:
        here.out.warn(f"{kept} may not be written to with these credentials: pull works, push does not")
    here.out.hint(f"llmos push {name} --all, or llmos pull {name} --all")


def ls(ctx: typer.Context) -> None:
    """List the remotes.

    Examples:
      llmos remote ls
    """
    here = session(ctx)
    with here.open_store() as store:
        remotes = sorted(store.config.remotes.items())
    here.out.result({"remotes": [{"remote": name, "url": url} for name, url in remotes]})
    if remotes:
        here.out.table(["remote", "url"], [list(pair) for pair in remotes])
    else:
        here.out.say("no remotes")
        here.out.hint("llmos remote add NAME URL")


def rm(ctx: typer.Context, name: NameArgument) -> None:
    """Forget a remote. What it holds stays as it is.

    Examples:
      llmos remote rm nas
    """
    from llmos_cli.remote.open import remove_remote

    here = session(ctx)
    with here.open_store() as store:
        url = remove_remote(store, name)
    here.out.result({"remote": name, "url": url})
    here.out.line(f"forgot {name} ({url})")


def show(ctx: typer.Context, name: PoolArgument) -> None:
    """Show a pool: its nodes, its copies, what each node holds.

    N packs on M nodes, R copies each, make about K = N*R/M packs a node.

    Examples:
      llmos remote show team
    """
    from llmos_cli.remote.pool.pools import find_pool_remote
    from llmos_cli.remote.pool.scrub import look

    here = session(ctx)
    with here.open_store() as store:
        remote = find_pool_remote(store, name, here.cwd)
        survey = look(remote.pool)
    here.out.result(describe_pool(remote, survey))
    show_pool(here, remote, survey)


def status(ctx: typer.Context, name: PoolArgument) -> None:
    """Show how a pool is: nodes up, packs with too few copies, balance.

    Looks at lists, and reads no pack: see 'llmos remote scrub'. "healthy" in the JSON says whether all is well.

    Examples:
      llmos remote status team
      llmos remote status team --json
    """
    from llmos_cli.remote.pool.ballot import pending
    from llmos_cli.remote.pool.pools import find_pool_remote
    from llmos_cli.remote.pool.scrub import look

    here = session(ctx)
    with here.open_store() as store:
        remote = find_pool_remote(store, name, here.cwd)
        survey = look(remote.pool)
        unfinished = pending(remote.pool.live)
    here.out.result(describe_pool(remote, survey) | describe_health(survey, unfinished))
    show_pool(here, remote, survey)
    show_health(here, remote, survey, unfinished)


def scrub(
    ctx: typer.Context,
    name: PoolArgument,
    *,
    percent: Annotated[
        float, typer.Option("--percent", metavar="P", min=0, max=100, help="Read this share of the packs.")
    ] = 100.0,
) -> None:
    """Read what every node of a pool holds, and compare it with its names.

    Damaged copies are listed with their node, and the exit code is then 13; 'llmos remote repair' puts them right.
    With --percent, packs are chosen anew each time.

    Examples:
      llmos remote scrub team
      llmos remote scrub team --percent 5
    """
    from llmos_cli.remote.pool.ballot import pending
    from llmos_cli.remote.pool.pools import find_pool_remote
    from llmos_cli.remote.pool.scrub import scrub as read_all

    here = session(ctx)
    with here.open_store() as store:
        remote = find_pool_remote(store, name, here.cwd)
        survey = read_all(remote.pool, here.out.progress, percent)
        unfinished = pending(remote.pool.live)
    found = describe_pool(remote, survey) | describe_health(survey, unfinished)
    here.out.result(found | {"read_bytes": survey.read})
    show_damage(here, survey)
    if found["damaged"]:
        raise Damaged(
            f"{plural(len(found['damaged']), 'damaged file')} in {remote.label}",
            hint=f"llmos remote repair {remote.label}",
        )
    here.out.line(f"{size(survey.read)} read at {plural(len(survey.asked), 'node')}: every byte is what it was")


def repair(
    ctx: typer.Context,
    name: PoolArgument,
    *,
    quick: Annotated[bool, typer.Option("--quick", help="Look for what is missing, and read no other copies.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
) -> None:
    """Make a pool whole again, and put everything where it belongs.

    What a node lacks or has damaged is copied from one whose copy is proven; a node that was wiped is filled and let
    in again. After a node was added or removed, this moves what has to move. A copy that is no longer needed goes last,
    once the others have been read and found whole.

    Examples:
      llmos remote repair team --dry-run
      llmos remote repair team
    """
    from llmos_cli.remote.pool.heal import down, execute_heal, plan_heal
    from llmos_cli.remote.pool.pools import find_pool_remote

    here = session(ctx)
    with here.open_store() as store:
        remote = find_pool_remote(store, name, here.cwd)
        plan = plan_heal(remote.pool, here.out.progress, quick=quick)
        done = None if dry_run else execute_heal(remote.pool, plan, store.tmp, here.out.progress)[1]
    here.out.result({"remote": remote.name, "url": remote.pool.url} | describe_heal(plan, done))
    show_heal(here, plan, done)
    for url in down(plan):
        here.out.warn(f"{url} does not answer; repair again when it is back, or take it out: llmos remote rm-node")
    if plan.lost:
        raise Damaged(lost_words(plan.lost), hint="bring back the nodes that had it, or push again what it held")
    if done and done.failed:
        raise PartlyDone(f"{plural(len(done.failed), 'copy')} could not be made", hint="run the command again")


def add_node(
    ctx: typer.Context,
    name: PoolArgument,
    url: Annotated[str, typer.Argument(metavar="URL", help="The new node, empty.", show_default=False)],
) -> None:
    """Let a node into a pool.

    It gets all refs at once; packs move to it with the next 'llmos remote repair', about 1/M of the data.

    Examples:
      llmos remote add-node team /mnt/e
    """
    from llmos_cli.remote.pool.pools import add_node as let_in
    from llmos_cli.remote.pool.pools import find_pool_remote

    here = session(ctx)
    with here.open_store() as store:
        remote = let_in(store, find_pool_remote(store, name, here.cwd), url, here.cwd)
    _changed(ctx, remote, f"{url} is a node of {remote.label}")


def rm_node(
    ctx: typer.Context,
    name: PoolArgument,
    nodes: Annotated[
        list[str], typer.Argument(metavar="URL...", help="Nodes, by URL or the start of an id.", show_default=False)
    ],
    *,
    lost: Annotated[
        bool, typer.Option("--lost", help="They never come back: go on without them, however many.")
    ] = False,
) -> None:
    """Take nodes out of a pool, whether they are there or gone.

    What a node that is there holds is first copied to those that will keep it; its own files stay with it. What was
    only on nodes that are gone is made up from the other copies by the next 'llmos remote repair'.

    Examples:
      llmos remote rm-node team /mnt/b
    """
    from llmos_cli.remote.pool.pools import find_nodes, find_pool_remote, remove_nodes

    here = session(ctx)
    with here.open_store() as store:
        remote = find_pool_remote(store, name, here.cwd)
        remote = remove_nodes(store, remote, find_nodes(remote, nodes, here.cwd), lost=lost)
    _changed(ctx, remote, f"{', '.join(nodes)} no longer in {remote.label}")


def _changed(ctx: typer.Context, remote: "PoolRemote", text: str) -> None:
    here = session(ctx)
    members = remote.pool.members
    here.out.result(
        {
            "remote": remote.name,
            "url": remote.pool.url,
            "epoch": members.epoch,
            "replicas": members.replicas,
            "nodes": [{"node": member.id, "url": member.url} for member in members.nodes],
        }
    )
    here.out.line(text)
    here.out.hint(f"llmos remote repair {remote.label} moves what has to move")


def publish(ctx: typer.Context, name: NameArgument) -> None:
    """Let web servers give a remote away: write down what it holds.

    A plain web server that serves the remote's files is then a remote itself, for reading: https://HOST/PATH. It must
    answer requests for a range of bytes. Each later push renews the list.

    Examples:
      llmos remote publish nas
      llmos clone https://models.example.org/nas copy
    """
    from llmos_cli.remote.open import find_remote, require_ready
    from llmos_cli.remote.transports.listing import publish as write_listing

    here = session(ctx)
    with here.open_store() as store:
        remote = find_remote(store, name, here.cwd)
        require_ready(remote.transport)
        keys = write_listing(store, remote.transport)
    here.out.result({"remote": remote.name, "url": remote.transport.url, "keys": keys})
    here.out.line(f"published {remote.label}: {plural(keys, 'file')}")


SUBCOMMANDS = {
    "add": add,
    "ls": ls,
    "rm": rm,
    "publish": publish,
    "show": show,
    "status": status,
    "repair": repair,
    "scrub": scrub,
    "add-node": add_node,
    "rm-node": rm_node,
}
