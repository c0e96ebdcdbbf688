"""The benchmarks of `make bench-peers`. Each imports its peers when it runs."""

from __future__ import annotations

from tools.dev.benchmarks.peers.distances import distances
from tools.dev.benchmarks.peers.flows import flows
from tools.dev.benchmarks.peers.loading import loading
from tools.dev.benchmarks.peers.sharding import sharding
from tools.dev.benchmarks.peers.training import training

PEERS = {
    "loading": loading,
    "sharding": sharding,
    "training": training,
    "flows": flows,
    "distances": distances,
}
