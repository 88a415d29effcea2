"""Loaded by every Python process of the engines. See ../README.md for why.

Only standard modules are allowed at the top: this runs first in every process, including helper processes.
"""

import importlib.abc
import importlib.util
import os
import sys
import time


def stay_polite_on_few_cores():
    """vLLM's idle processes spin on sched_yield and pin themselves to one and the same core."""
    os.sched_yield = lambda: time.sleep(0.0005)
    os.sched_setaffinity = lambda pid, cores: None


def cpu_connector(module):
    """A device connector for vLLM's CPU backend: LMCache's abstract class with copies by plain indexing."""
    import torch

    class CpuConnector(module.GPUConnectorInterface):
        def __init__(self, metadata):
            self.layers, _, _, heads, head_size = metadata.kv_shape
            self.width = heads * head_size
            self.caches = None

        def initialize_kvcaches_ptr(self, **given):
            self.caches = given.get("kvcaches", self.caches)

        def get_shape(self, num_tokens):
            return torch.Size([2, self.layers, num_tokens, self.width])

        def layer_views(self):
            """Returns K and V of each layer as views [blocks, tokens, heads, head size] of the engine's memory.

            CPU attention stores [blocks, heads, tokens, 2 x head size]. The first half of a block is K with tokens innermost,
            the second half is V with the head size innermost.
            """
            caches = self.caches.values() if isinstance(self.caches, dict) else self.caches
            for cache in caches:
                blocks, heads, tokens, double = cache.shape
                size = double // 2
                halves = cache.view(blocks, heads, 2, tokens * size)
                keys = halves.select(2, 0).unflatten(-1, (size, tokens)).permute(0, 3, 1, 2)
                values = halves.select(2, 1).unflatten(-1, (tokens, size)).permute(0, 2, 1, 3)
                yield keys, values

        def copy(self, memory, start, end, into_engine, given):
            self.initialize_kvcaches_ptr(**given)
            slots = given["slot_mapping"][start:end].long().cpu()
            staged = memory.tensor.view(2, self.layers, end - start, self.width)
            for layer, views in enumerate(self.layer_views()):
                for which, view in enumerate(views):
                    block, offset = slots // view.shape[1], slots % view.shape[1]
                    if into_engine:
                        wanted = slots >= 0
                        rows = staged[which, layer][wanted].view(-1, view.shape[2], view.shape[3])
                        view[block[wanted], offset[wanted]] = rows
                    else:
                        staged[which, layer] = view[block, offset].reshape(end - start, self.width)

        def to_gpu(self, memory_obj, start, end, **given):
            self.copy(memory_obj, start, end, True, given)

        def from_gpu(self, memory_obj, start, end, **given):
            self.copy(memory_obj, start, end, False, given)

        def batched_to_gpu(self, memory_objs, starts, ends, **given):
            for memory_obj, start, end in zip(memory_objs, starts, ends):
                self.to_gpu(memory_obj, start, end, **given)

        def batched_from_gpu(self, memory_objs, starts, ends, **given):
            for memory_obj, start, end in zip(memory_objs, starts, ends):
                self.from_gpu(memory_obj, start, end, **given)

    return CpuConnector


def teach_lmcache(module):
    """Makes LMCache's factory fall back to the connector above if it knows none."""
    known = module.CreateGPUConnector

    def create(config, metadata, engine, layout_hints=None):
        try:
            return known(config, metadata, engine, layout_hints=layout_hints)
        except RuntimeError as error:
            if "No supported cpu connector" in str(error):
                return cpu_connector(module)(metadata)
            raise

    module.CreateGPUConnector = create


def keep_to_one_layout(module):
    """On a CPU with AMX the attention packs K and V in another layout, which the connector above does not know."""
    known = module._get_attn_isa

    def isa(*given, **named):
        found = known(*given, **named)
        return "vec" if found == "amx" else found

    module._get_attn_isa = isa


class AfterImport(importlib.abc.MetaPathFinder):
    """Calls a function with a module right after its import."""

    def __init__(self, name, then):
        self.name, self.then = name, then

    def find_spec(self, name, path, target=None):
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            self.then(module)

        spec.loader.exec_module = exec_module
        return spec


stay_polite_on_few_cores()
sys.meta_path.insert(0, AfterImport("lmcache.v1.gpu_connector", teach_lmcache))
sys.meta_path.insert(0, AfterImport("vllm.v1.attention.backends.cpu_attn", keep_to_one_layout))
