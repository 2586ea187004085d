#pragma once
// The images that both trainers train on, from the four idx files of Fashion-MNIST or MNIST. launch/data.py is the Python side.

#include <cstdint>
#include <string>
#include <vector>

namespace thinwire::launch {

struct Images {
  std::size_t count = 0;
  std::vector<std::uint8_t> pixels;  ///< count x 28 x 28
  std::vector<std::uint8_t> labels;  ///< count, 0 to 9
};

struct Dataset {
  std::string source;  ///< in words
  Images train, test;
};

/// Reads train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, gzipped (.gz) or not, from
/// `folder`; if it is empty, from Debian's package dataset-fashion-mnist, or from the folder thinwire/digits of $XDG_CACHE_HOME
/// (~/.cache), where launch/setup writes scikit-learn's digits if the package is missing.
/// @throws Error{invalid_argument} naming the file: missing, truncated, not idx, other sizes, labels above 9.
Dataset load_dataset(const std::string& folder);

}  // namespace thinwire::launch
