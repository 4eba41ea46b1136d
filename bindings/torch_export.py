"""The documented path of `fewstep.bindings.export.torch_export`."""

from fewstep.bindings.export.torch_export import compile_loop as compile_loop
from fewstep.bindings.export.torch_export import export_loop as export_loop
