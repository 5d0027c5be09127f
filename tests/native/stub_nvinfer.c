/* What TensorRT's Python bindings look up when they are imported; every factory gives a null pointer. */
#define EMPTY(name) void *name(void) { return 0; }
EMPTY(createInferBuilder_INTERNAL)
EMPTY(createInferRuntime_INTERNAL)
EMPTY(createInferRefitter_INTERNAL)
EMPTY(createNvOnnxParser_INTERNAL)
EMPTY(createNvOnnxParserRefitter_INTERNAL)
EMPTY(getBuilderPluginRegistry)
EMPTY(getPluginRegistry)
EMPTY(getNvOnnxParserVersion)
EMPTY(initLibNvInferPlugins)
