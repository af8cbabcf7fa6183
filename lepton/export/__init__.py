"""A net as a program: exported once, run anywhere without the code that built it."""

from lepton.export.program import Program, Signature, TensorSpec, export_net, load_program

__all__ = ["Program", "Signature", "TensorSpec", "export_net", "load_program"]
