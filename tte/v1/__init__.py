"""Version 1 of the API. Import the modules: `from tte.v1 import retrieval_pb2`."""
