// Samples from a package of fewstep's compile_loop, without Python.
//
//     torch_loop loop.pt2 4x1x8x8 [shape of the next input ...] < inputs > samples
//
// Standard input holds the values of all inputs one after the other, in the package's order: x, the conditions, the
// noise. They are float32, or int64 where the shape says so: 4:int64. Standard output gets the samples'. A package checks
// its inputs: a wrong shape ends in a message and code 1.
#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>
#include <exception>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

// An empty tensor for "4x1x8x8" or "4:int64".
static at::Tensor input(const std::string& text) {
  const size_t colon = text.find(':');
  if (colon != std::string::npos && text.substr(colon) != ":int64")
    throw std::runtime_error("an input is float32, or int64 as in 4:int64; got " + text);
  std::vector<int64_t> sizes;
  std::istringstream parts(text.substr(0, colon));
  for (std::string part; std::getline(parts, part, 'x');) sizes.push_back(std::stoll(part));
  return at::empty(sizes, colon == std::string::npos ? at::kFloat : at::kLong);
}

int main(int argc, char** argv) {
  if (argc < 3) {
    std::fprintf(stderr, "usage: %s loop.pt2 4x1x8x8 [shape ...] < inputs > samples\n", argv[0]);
    return 2;
  }
  try {
    c10::InferenceMode without_gradients;
    torch::inductor::AOTIModelPackageLoader loop(argv[1]);
    std::vector<at::Tensor> inputs;
    for (int i = 2; i < argc; ++i) {
      inputs.push_back(input(argv[i]));
      if (std::fread(inputs.back().mutable_data_ptr(), 1, inputs.back().nbytes(), stdin) != inputs.back().nbytes())
        throw std::runtime_error("standard input ends before input " + std::to_string(i - 2) + " is full");
    }
    const at::Tensor sample = loop.run(inputs).at(0).contiguous();
    std::fwrite(sample.const_data_ptr<float>(), sizeof(float), sample.numel(), stdout);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
