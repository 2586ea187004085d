#include "launch/trainer/idx.hpp"

#include <zlib.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <memory>

#include "compressors/core/error.hpp"

namespace thinwire::launch {

namespace {

constexpr char kDebianFolder[] = "/usr/share/datasets/fashion-mnist";
constexpr std::size_t kSide = 28;

/// A file's bytes; zlib reads plain files too.
std::vector<std::uint8_t> read_file(const std::string& path) {
  const std::unique_ptr<gzFile_s, int (*)(gzFile)> file(gzopen(path.c_str(), "rb"), gzclose);
  THINWIRE_EXPECTS(file != nullptr, path + ": cannot be opened");
  std::vector<std::uint8_t> bytes;
  constexpr std::size_t kBlock = std::size_t(1) << 20;
  for (;;) {
    const std::size_t before = bytes.size();
    bytes.resize(before + kBlock);
    const int got = gzread(file.get(), bytes.data() + before, kBlock);
    int status = Z_OK;
    const char* complaint = gzerror(file.get(), &status);
    THINWIRE_EXPECTS(got >= 0 && (status == Z_OK || status == Z_STREAM_END), path + ": cannot be read: " + complaint);
    bytes.resize(before + std::size_t(got));
    if (got == 0) return bytes;
  }
}

std::string find_file(const std::string& folder, const std::string& stem) {
  for (const char* ending : {".gz", ""}) {
    const std::string path = folder + "/" + stem + ending;
    if (std::filesystem::is_regular_file(path)) return path;
  }
  fail(Errc::invalid_argument, folder + ": missing " + stem + "[.gz]");
}

/// The elements of an idx file of bytes: 0, 0, 8, the number of dimensions, the dimensions (big-endian words), the bytes.
std::vector<std::uint8_t> read_idx(const std::string& path, std::size_t dims, std::size_t* shape) {
  std::vector<std::uint8_t> bytes = read_file(path);
  const std::size_t header = 4 + 4 * dims;
  THINWIRE_EXPECTS(bytes.size() >= header && bytes[0] == 0 && bytes[1] == 0 && bytes[2] == 8 && bytes[3] == dims,
                   path + ": not an idx file of bytes with " + std::to_string(dims) + " dimensions");
  std::size_t count = 1;
  for (std::size_t i = 0; i < dims; ++i) {
    const std::uint8_t* word = bytes.data() + 4 + 4 * i;
    shape[i] = std::size_t(word[0]) << 24 | std::size_t(word[1]) << 16 | std::size_t(word[2]) << 8 | word[3];
    count *= shape[i];
  }
  THINWIRE_EXPECTS(bytes.size() == header + count,
                   path + ": " + std::to_string(bytes.size()) + " bytes, but its header asks for " + std::to_string(header + count));
  bytes.erase(bytes.begin(), bytes.begin() + std::ptrdiff_t(header));
  return bytes;
}

Images load_part(const std::string& folder, const std::string& part) {
  Images images;
  std::size_t shape[3], labels = 0;
  const std::string image_file = find_file(folder, part + "-images-idx3-ubyte"),
                    label_file = find_file(folder, part + "-labels-idx1-ubyte");
  images.pixels = read_idx(image_file, 3, shape);
  THINWIRE_EXPECTS(shape[0] > 0 && shape[1] == kSide && shape[2] == kSide, image_file + ": images must be 28 x 28, and there must be some");
  images.count = shape[0];
  images.labels = read_idx(label_file, 1, &labels);
  THINWIRE_EXPECTS(labels == images.count,
                   label_file + ": " + std::to_string(labels) + " labels for " + std::to_string(images.count) + " images");
  THINWIRE_EXPECTS(*std::max_element(images.labels.begin(), images.labels.end()) <= 9, label_file + ": a label above 9");
  return images;
}

/// Where launch/setup writes scikit-learn's digits.
std::string digits_folder() {
  const char *cache = std::getenv("XDG_CACHE_HOME"), *home = std::getenv("HOME");
  if (cache != nullptr && *cache != 0) return std::string(cache) + "/thinwire/digits";
  return std::string(home != nullptr ? home : "") + "/.cache/thinwire/digits";
}

}  // namespace

Dataset load_dataset(const std::string& folder) {
  const auto load = [](const std::string& source, const std::string& from) {
    return Dataset{source, load_part(from, "train"), load_part(from, "t10k")};
  };
  if (!folder.empty()) return load("idx files in " + folder, folder);
  if (std::filesystem::is_directory(kDebianFolder)) return load("Fashion-MNIST (Debian package dataset-fashion-mnist)", kDebianFolder);
  const std::string digits = digits_folder();
  THINWIRE_EXPECTS(std::filesystem::is_directory(digits), "no data: the Debian package dataset-fashion-mnist is not installed, " + digits +
                                                              " is not there (launch/setup writes it) and --data names no folder");
  return load("scikit-learn's digits (Fashion-MNIST is not installed)", digits);
}

}  // namespace thinwire::launch
