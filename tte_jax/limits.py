"""What a request may hold. The protos' comments promise these; `servers.convert` enforces them."""

from __future__ import annotations

# Messages and batches
MAX_MESSAGE_BYTES = 32 * 2**20
MAX_BATCH_ITEMS = 64
MAX_DELETE_IDS = 1_000

# Contents
MAX_PARTS = 16
MAX_TEXT_CHARS = 8_192
MAX_INSTRUCTION_CHARS = 2_048
MAX_REASONING_CHARS = 32_768  # an ECR's text where a request carries one, and texts to rerank
MAX_IMAGE_PIXELS = 50_000_000
MAX_PAGES = 10_000
MAX_PAGE_PIXELS = 16_000_000  # of one drawn page; a larger sheet is drawn with fewer dots
MAX_VIDEO_FRAMES = 216_000  # two hours at 30 frames per second

# Documents, metadata and filters
MAX_ID_CHARS = 256
MAX_METADATA_FIELDS = 64
MAX_METADATA_KEY_CHARS = 128
MAX_METADATA_TEXT_CHARS = 1_024
MAX_FILTER_DEPTH = 8
MAX_FILTER_CONDITIONS = 256
MAX_FILTER_VALUES = 1_024

# Searches
MAX_TOP_K = 1_000
MAX_CANDIDATES = 1_000
MAX_SEARCH_VECTORS = 256  # of one batch
MAX_SEARCH_HITS = 16_384  # vectors times k of one batch
MAX_REWRITE_DEPTH = 50
MAX_RERANK_CANDIDATES = 256
MAX_NEW_TOKENS = 4_096
MAX_TEMPERATURE = 2.0
MAX_STOPS = 4
MAX_STOP_CHARS = 64
MAX_DIMENSION = 8_192

DEFAULT_TOP_K = 10
