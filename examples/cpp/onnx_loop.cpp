// Samples from a file of fewstep's save_loop(..., shape=...), on ONNX Runtime alone: a seed is all it needs.
//
//     onnx_loop loop.onnx batch seed > samples
//
// Standard output gets the float32 values of the samples, which are those of fewstep.Sampler with that seed. The network
// here takes no conditions; a condition is one more name and tensor in the lists below.
#include <onnxruntime_cxx_api.h>

#include <array>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <string>
#include <vector>

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: %s loop.onnx batch seed > samples\n", argv[0]);
    return 2;
  }
  try {
    const int64_t batch = std::stoll(argv[2]);
    const uint64_t seed = std::stoull(argv[3]);
    Ort::Env env(ORT_LOGGING_LEVEL_WARNING, "fewstep");
    Ort::Session loop(env, argv[1], Ort::SessionOptions{});
    // A row per sample: low and high half of its seed, and its number.
    std::vector<int64_t> streams;
    for (int64_t sample = 0; sample < batch; ++sample) {
      streams.push_back(static_cast<int64_t>(seed & 0xFFFFFFFF));
      streams.push_back(static_cast<int64_t>(seed >> 32));
      streams.push_back(sample);
    }
    const std::array<int64_t, 2> shape{batch, 3};
    const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    const Ort::Value input =
        Ort::Value::CreateTensor<int64_t>(memory, streams.data(), streams.size(), shape.data(), shape.size());
    const char* inputs[] = {"streams"};
    const char* outputs[] = {"sample"};
    const auto results = loop.Run(Ort::RunOptions{}, inputs, &input, 1, outputs, 1);
    const size_t count = results[0].GetTensorTypeAndShapeInfo().GetElementCount();
    std::fwrite(results[0].GetTensorData<float>(), sizeof(float), count, stdout);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
