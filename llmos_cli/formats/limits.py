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
