"""The differentiable importer: an ONNX file as a torch module, the twin an audit attacks a deployed file through.

`load.import_onnx` reads a file, `module.OnnxModule` runs it. The operators lie here by family, each a function on
tensors after its definition in the ONNX standard; what is not covered is a named error, never a silent skip.
"""
