"""Where the tensors of a stored model lie, without loading any."""

from llmos_cli.errors import Damaged, NotFound
from llmos_cli.formats.manifest import FileEntry, Manifest
from llmos_cli.formats.safetensors import TensorInfo, read_shard_index, read_table
from llmos_cli.store.handle import Store
from llmos_cli.store.packs.objects import open_file, read_file

_INDEX = "model.safetensors.index.json"


def tensor_table(store: Store, manifest: Manifest, folder: str = "") -> dict[str, tuple[FileEntry, TensorInfo]]:
    """Every tensor of the *.safetensors files directly in `folder`: name -> (file, where in it).

    With an index file, exactly the shards it names count, and each tensor must lie where the index says. Raises
    NotFound if there are no tensors, Damaged if a name stands twice or an index and its shards disagree.
    """
    prefix = f"{folder}/" if folder else ""
    files = {
        entry.path.removeprefix(prefix): entry
        for entry in manifest.files
        if entry.path.startswith(prefix) and "/" not in entry.path.removeprefix(prefix)
    }
    shards = {name: entry for name, entry in files.items() if name.endswith(".safetensors")}
    index = read_shard_index(read_file(store, files[_INDEX]), _INDEX) if _INDEX in files else None
    if index is not None:
        missing = set(index.values()) - shards.keys()
        if missing:
            raise Damaged(f"{_INDEX} names {sorted(missing)[0]!r}, which is not among the files")
        shards = {name: shards[name] for name in set(index.values())}
    if not shards:
        raise NotFound(
            f"no safetensors files in {folder or 'this object'}", hint="see its files: llmos show REF --files"
        )
    table: dict[str, tuple[FileEntry, TensorInfo]] = {}
    for name, entry in sorted(shards.items()):
        for tensor in read_table(open_file(store, entry).read, entry.size, entry.path):
            if tensor.name in table:
                raise Damaged(f"tensor {tensor.name!r} stands in two files")
            if index is not None and index.get(tensor.name) != name:
                raise Damaged(f"tensor {tensor.name!r} lies in {name!r}, the index says otherwise")
            table[tensor.name] = (entry, tensor)
    if index is not None and index.keys() - table.keys():
        raise Damaged(f"{_INDEX} names tensor {sorted(index.keys() - table.keys())[0]!r}, which is in no file")
    return table
