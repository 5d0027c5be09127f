"""From an ONNX file to an engine of TensorRT or TensorRT-RTX. Needs no torch, so that a board can do it."""
