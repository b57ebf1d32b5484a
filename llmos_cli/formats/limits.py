"""The declared limits of every structure: one table, so that a reader's worst case is known before it reads."""

KiB = 1 << 10
MiB = 1 << 20
GiB = 1 << 30

CHUNK_BYTES = 4 * MiB  # plain bytes of a chunk, the grid of big tensors
MANIFEST_BYTES = 64 * MiB  # plain bytes of a manifest
PACK_TARGET_BYTES = 64 * MiB  # a pack is closed once it holds this much
PACK_BYTES = 1 * GiB  # a pack larger than this is refused
PACK_FRAMES = 1 << 20
JSON_DEPTH = 32
JSON_VALUES = 12_000_000  # lists, tables and items of one JSON text, about 100 bytes of memory each
MANIFEST_FILES = 1_000_000
PATH_BYTES = 4096
PATH_PART_BYTES = 255
PATH_DEPTH = 64
REF_PART_BYTES = 128  # a name or a tag
REF_FILE_BYTES = 16 * KiB
SAFETENSORS_HEADER_BYTES = 100_000_000  # the format's own cap
SAFETENSORS_TENSORS = 1_000_000
SAFETENSORS_RANK = 16
ZSTD_WINDOW_LOG = 27
DELTA_DEPTH = 8
GGUF_HEADER_BYTES = 256 * MiB  # keys, values and the table of tensors; a vocabulary of 256,000 tokens takes 16 MiB
GGUF_KEYS = 1 << 16
GGUF_TENSORS = 1 << 17
GGUF_STRINGS = 1 << 21  # strings and arrays inside arrays, all together
GGUF_NAME_BYTES = (1 << 16) - 1  # of a key or a tensor; the format's own cap for keys
GGUF_RANK = 8  # the format's is 4 and may grow
GGUF_DEPTH = 4  # arrays in arrays
ZIP_DIRECTORY_BYTES = 8 * MiB  # about 100 bytes an entry
PICKLE_BYTES = 16 * MiB  # of a torch file, its tensors not counted
PICKLE_OPCODES = 2_000_000  # about 30 a tensor
PICKLE_DEPTH = 32  # dictionaries in dictionaries on the way to a tensor
NPY_HEADER_BYTES = 10_000  # numpy's own cap
POOL_NODES = 256  # of a pool
SNAPSHOT_BYTES = 64 * MiB  # a backup's list of refs, their logs and manifests
