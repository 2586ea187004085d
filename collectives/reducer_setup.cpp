#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <set>

#include "collectives/reducer_impl.hpp"
#include "compressors/core/device.hpp"
#include "compressors/core/error.hpp"
#include "compressors/core/registry.hpp"
#include "compressors/core/wire.hpp"

namespace thinwire {
namespace {

ParameterSlot make_slot(Parameter parameter, const Config& config, bool has_codec) {
  ParameterSlot slot;
  slot.numel = 1;
  bool too_large = false;
  for (const std::size_t extent : parameter.shape) too_large |= __builtin_mul_overflow(slot.numel, extent, &slot.numel);
  if (too_large || slot.numel > SIZE_MAX / 2 || (!parameter.shape.empty() && parameter.shape.front() > UINT32_MAX))
    fail(Errc::invalid_argument,
         "parameter '" + parameter.name + "' is too large: its first dimension has at most 2^32 - 1 rows, its elements 2^63");
  slot.rows = parameter.shape.empty() ? 1 : std::uint32_t(parameter.shape.front());
  slot.columns = slot.rows == 0 ? 0 : std::uint32_t(slot.numel / slot.rows);
  if (!has_codec) {
    slot.never_reason = "codec=none";
  } else if (parameter.shape.size() < 2) {
    slot.never_reason = "fewer than two dimensions";
  } else if (slot.numel < config.min_numel()) {
    slot.never_reason = "fewer than min_numel=" + std::to_string(config.min_numel()) + " elements";
  } else if (slot.numel == 0) {
    slot.never_reason = "empty";
  }
  slot.compressible = slot.never_reason.empty();
  slot.parameter = std::move(parameter);
  return slot;
}

std::uint64_t fingerprint_of(const Parameter& parameter, std::uint64_t before) {
  const std::uint64_t h = wire::hash_bytes(parameter.name.data(), parameter.name.size(), before);
  return wire::hash_bytes(parameter.shape.data(), parameter.shape.size() * sizeof(std::size_t), h);
}

std::string describe(const Parameter& parameter) {
  std::size_t length = parameter.name.size();
  if (length > 300) {
    for (length = 300; length > 0 && (static_cast<unsigned char>(parameter.name[length]) & 0xc0) == 0x80;) --length;  // UTF-8 stays whole
  }
  std::string text = "'" + parameter.name.substr(0, length) + (length < parameter.name.size() ? "…" : "") + "' of shape (";
  for (std::size_t d = 0; d < parameter.shape.size(); ++d) text += (d == 0 ? "" : ", ") + std::to_string(parameter.shape[d]);
  return text + ")";
}

/// A duplicate with this deadline; the group it is made of keeps its own.
std::unique_ptr<Communicator> split_within(Communicator& parent, std::chrono::milliseconds timeout) {
  const Deadline deadline(parent, timeout);
  std::unique_ptr<Communicator> own = parent.split(0, parent.rank());
  own->set_timeout(timeout);
  return own;
}

}  // namespace

GradientReducer::Impl::Impl(std::shared_ptr<Communicator> communicator, const Config& config, std::vector<Parameter> parameters,
                            ReducerOptions options)
    : parent_(std::move(communicator)),
      config_(config),
      options_(std::move(options)),
      codec_(options_.device < 0 ? make_codec(config) : make_device_codec(config)),
      recursion_(make_recursion(config)),
      before_freeze_{Recursion::Kind::none},
      two_phase_(codec_ != nullptr && uses_two_phase(config, *codec_)),
      policy_(make_policy(config)) {
  before_freeze_.clip_norm = recursion_.clip_norm;
  dense_steps_ = config.start_step();
  if (recursion_.kind == Recursion::Kind::estimate) {
    const std::string& init = config.feedback().text("init");
    init_ = init == "dense" ? Init::dense : init == "compressed" ? Init::compressed : Init::zero;
    if (init_ == Init::dense) dense_steps_ = std::max<std::uint64_t>(dense_steps_, 1);
  }
  compressed_from_ = dense_steps_;
  if (recursion_.averaged && !options_.momentum_elsewhere) {
    if (config.target().text("freeze") == "auto")
      fail(Errc::invalid_config, "target=momentum: freeze=auto is decided by an optimizer, and there is none here; give freeze=STEP");
    freeze_at_ = config.target().integer("freeze");
  } else if (recursion_.averaged) {
    const bool automatic = config.target().text("freeze") == "auto";
    freeze_steps_ = FreezeSteps{automatic ? 0 : config.target().integer("freeze")};
  }
  THINWIRE_EXPECTS(parent_ != nullptr, "a reducer needs a communicator");
  std::set<std::string> names;
  for (Parameter& parameter : parameters) {
    if (!names.insert(parameter.name).second)
      fail(Errc::invalid_argument, "two parameters are named '" + parameter.name + "'; state is keyed by name");
    slots_.push_back(make_slot(std::move(parameter), config, codec_ != nullptr));
    total_numel_ += slots_.back().numel;
  }
  if (slots_.empty()) fail(Errc::invalid_argument, "a reducer needs at least one parameter");
  if (slots_.size() > std::size_t(1) << 31) fail(Errc::invalid_argument, std::to_string(slots_.size()) + " parameters are more than 2^31");
  check_sizes();
  lay_out_state();
  seen_.assign(slots_.size(), 0);
  pass_reasons_.resize(slots_.size());

  communicator_ = split_within(*parent_, std::chrono::milliseconds(std::int64_t(std::ceil(config.timeout_seconds() * 1000))));
  const EngineParts parts{*communicator_, codec_.get(), recursion_, options_, arena_, slots_.size(), total_numel_, config.check_every()};
  if (options_.device >= 0 && codec_ != nullptr) check_device_memory();
  engine_ = options_.device < 0 ? make_host_engine(parts) : make_device_engine(parts, options_.device);
  if (const float* limits = recursion_.control ? engine_->eta_limits() : nullptr; limits != nullptr)
    for (std::size_t p = 0; p < slots_.size(); ++p) slots_[p].state.eta_limit = limits + p;
  const bool threaded = communicator_->any_thread() && !options_.inline_queue && options_.device < 0;
  queue_ = std::make_unique<WorkQueue>(
      threaded, [this](Job& job) { run(job); },
      [this](const Job& job, std::exception_ptr error) { return explain(job, std::move(error)); });
}

void GradientReducer::Impl::check_sizes() const {
  for (std::size_t p = 0; p < slots_.size(); ++p) {
    const ParameterSlot& slot = slots_[p];
    if (!slot.compressible) continue;
    const Segment segment{std::uint32_t(p), 0, slot.numel, slot.rows, slot.columns, policy_->setting(0, std::uint32_t(p)), nullptr};
    const std::uint32_t end = 1;
    try {
      (void)codec_->layout({std::span(&segment, 1), std::span(&end, 1), 0});
    } catch (const Error& error) { fail(error.code(), with_names(error.what())); }
  }
}

std::string GradientReducer::Impl::with_names(std::string what) const {
  constexpr std::string_view kWord = "parameter ";
  for (std::size_t at = what.find(kWord); at != std::string::npos; at = what.find(kWord, at)) {
    at += kWord.size();
    std::uint32_t id = 0;
    const auto [end, error] = std::from_chars(what.data() + at, what.data() + what.size(), id);
    if (error != std::errc() || id >= slots_.size()) continue;
    at = std::size_t(end - what.data());
    const std::string name = " '" + slots_[id].parameter.name + "'";
    what.insert(at, name);
    at += name.size();
  }
  return what;
}

void GradientReducer::Impl::check_device_memory() const {
  std::vector<std::uint32_t> ids(slots_.size());
  std::iota(ids.begin(), ids.end(), 0u);
  const std::size_t world = std::size_t(communicator_->size());
  std::size_t bytes = 0;
  for (const bool dense : {false, true}) {
    const BucketPlan all = make_bucket_plan(ids, DType::fp32, dense, slots_, codec_.get(), recursion_, communicator_->size(),
                                            communicator_->rank(), two_phase_);
    bytes = std::max(bytes, scratch_bytes(all, world));
  }
  const std::size_t largest = options_.largest_bucket == 0 ? total_numel_ : std::min(options_.largest_bucket, total_numel_);
  const double need = double(bytes) * double(largest) / double(std::max<std::size_t>(total_numel_, 1));
  std::size_t free = device_free_memory(options_.device);
  if (need > double(free) && reclaim_device_memory()) free = device_free_memory(options_.device);
  if (need > double(free))
    fail(Errc::device, "GPU " + std::to_string(options_.device) + ": a bucket of " + std::to_string(largest) + " elements needs " +
                           std::to_string(std::size_t(need)) + " bytes beside the state, " + std::to_string(free) + " are free");
}

void GradientReducer::Impl::lay_out_state() {
  // Array j holds state j of all parameters one after the other; what a codec remembers comes last. Cache-line starts, so that neighbours
  // share none: offsets and counts are in elements, of which narrow ones lie two to a float.
  constexpr std::size_t kLine = 16;
  std::array<std::size_t, kNamedArrays> counts{};
  std::vector<std::array<std::size_t, kNamedArrays>> offsets(slots_.size());
  const std::size_t full = state_names(recursion_).size(), dense = dense_state_names(recursion_).size();
  for (std::size_t p = 0; p < slots_.size(); ++p) {
    ParameterSlot& slot = slots_[p];
    const std::size_t arrays = slot.compressible ? full : codec_ != nullptr ? dense : 0;
    for (std::size_t j = 0; j < arrays; ++j) {
      offsets[p][j] = counts[j];
      counts[j] += round_up(slot.numel, state_dtype(recursion_, j) == DType::fp32 ? kLine : 2 * kLine);
    }
    if (!slot.compressible) continue;
    slot.setting = setting_at(dense_steps_, std::uint32_t(p));
    const Segment segment{std::uint32_t(p), 0, slot.numel, slot.rows, slot.columns, slot.setting, nullptr};
    slot.memory_count = codec_->memory(segment);
    offsets[p][kMemoryArray] = counts[kMemoryArray];
    counts[kMemoryArray] += slot.memory_count;
    if (!two_phase_) continue;
    slot.owned = owned_part(slot.numel, parent_->size(), parent_->rank());
    offsets[p][kServerArray] = counts[kServerArray];
    counts[kServerArray] += round_up(slot.owned.count, kLine);
  }
  for (std::size_t j = 0; j < kMaxStateArrays; ++j)
    if (state_dtype(recursion_, j) != DType::fp32) counts[j] /= 2;
  arena_ = options_.device < 0 ? Arena(counts) : Arena(counts, options_.device);
  for (std::size_t p = 0; p < slots_.size(); ++p) {
    ParameterSlot& slot = slots_[p];
    const std::size_t arrays = slot.compressible ? full : codec_ != nullptr ? dense : 0;
    for (std::size_t j = 0; j < arrays; ++j) {
      float* const array = arena_.array(j);
      slot.state.array[j] =
          state_dtype(recursion_, j) == DType::fp32 ? StateArray(array) : StateArray(reinterpret_cast<std::uint16_t*>(array));
      slot.state.array[j] = slot.state.array[j].from(offsets[p][j]);
    }
    if (slot.memory_count != 0) slot.state.memory = arena_.array(kMemoryArray) + offsets[p][kMemoryArray];
    if (!slot.compressible) continue;
    if (two_phase_) slot.server_residual = arena_.array(kServerArray) + offsets[p][kServerArray];
    if (!recursion_.averaged) continue;
    slot.shared_momentum = slot.state.array[0].fp32();
    slot.momentum_at = offsets[p][0];
    slot.beta1 = float(config_.target().number("beta1"));
  }
}

std::uint64_t GradientReducer::Impl::own_fingerprint() const {
  std::uint64_t h = 0;
  for (const ParameterSlot& slot : slots_) h = fingerprint_of(slot.parameter, h);
  return h;
}

std::string GradientReducer::Impl::first_difference(Communicator& communicator, int other, std::size_t other_count,
                                                    std::size_t first_count) const {
  const std::size_t world = std::size_t(communicator.size()), rank = std::size_t(communicator.rank());
  const std::size_t common = std::min(other_count, first_count);
  const auto gather = [&](auto& all) {
    const Bytes recv{reinterpret_cast<std::byte*>(all.data()), all.size() * sizeof all[0], DType::u8, Place::host, 0};
    communicator.all_gather(recv.sub(rank * recv.size / world, recv.size / world), recv);
  };
  std::vector<std::uint64_t> hashes(common * world);  // of any other count than these two's: as far as they go
  for (std::size_t p = 0; p < std::min(common, slots_.size()); ++p) hashes[rank * common + p] = fingerprint_of(slots_[p].parameter, 0);
  gather(hashes);
  std::size_t at = 0;
  while (at < common && hashes[at] == hashes[std::size_t(other) * common + at]) ++at;

  using Text = std::array<char, 512>;
  std::vector<Text> texts(world, Text{});
  if (at < slots_.size()) {
    const std::string text = describe(slots_[at].parameter);
    std::memcpy(texts[rank].data(), text.data(), std::min(text.size(), sizeof(Text) - 1));
  }
  gather(texts);
  const auto on = [&](int r) {
    Text& text = texts[std::size_t(r)];
    text.back() = '\0';
    return (text[0] == '\0' ? std::string("none") : std::string(text.data())) + " on rank " + std::to_string(r);
  };
  return "the first that differs is number " + std::to_string(at) + ": " + on(other) + ", " + on(0);
}

void GradientReducer::Impl::compare_handovers(Communicator& communicator) const {
  struct Given {
    std::uint64_t mask, masked;
    double beta1;
  };
  const std::size_t count = slots_.size(), world = std::size_t(communicator.size()), bytes = count * sizeof(Given);
  std::vector<Given> given(count * world);
  for (std::size_t p = 0; p < count; ++p) {
    const ParameterSlot& slot = slots_[p];
    given[std::size_t(communicator.rank()) * count + p] = {wire::hash_bytes(slot.live.data(), slot.live.size(), 0), slot.masked(),
                                                           slot.beta1};
  }
  const Bytes all{reinterpret_cast<std::byte*>(given.data()), bytes * world, DType::u8, Place::host, 0};
  communicator.all_gather(all.sub(std::size_t(communicator.rank()) * bytes, bytes), all);
  for (std::size_t r = 1; r < world; ++r) {
    for (std::size_t p = 0; p < count; ++p) {
      const Given &first = given[p], &other = given[r * count + p];
      const std::string whose = "the optimizers of rank " + std::to_string(r) + " and rank 0 handed over different ";
      const std::string of = " of parameter '" + slots_[p].parameter.name + "': ";
      if (other.beta1 != first.beta1)
        fail(Errc::invalid_argument, whose + "beta1s" + of + std::to_string(other.beta1) + " and " + std::to_string(first.beta1));
      if (other.mask != first.mask)
        fail(Errc::invalid_argument, whose + "masks" + of + std::to_string(other.masked) + " and " + std::to_string(first.masked) +
                                         " of its elements have a frozen variance of 0; load the same optimizer state_dict() on all ranks");
    }
  }
}

namespace {

/// All of a short text; of a long one what lies around `place`.
std::string excerpt(const std::string& text, std::size_t place) {
  constexpr std::size_t kShort = 500, kBefore = 200;
  if (text.size() <= kShort) return text;
  const auto inside = [](char c) { return (static_cast<unsigned char>(c) & 0xc0) == 0x80; };  // of a UTF-8 character
  std::size_t first = std::min(place > kBefore ? place - kBefore : 0, text.size() - kShort);
  while (first > 0 && inside(text[first])) --first;
  std::size_t last = first + kShort;
  while (last < text.size() && inside(text[last])) ++last;
  return (first > 0 ? "… " : "") + text.substr(first, last - first) + (last < text.size() ? " …" : "");
}

}  // namespace

void GradientReducer::Impl::compare_optimizers(Communicator& communicator, std::size_t longest) const {
  const std::size_t world = std::size_t(communicator.size()), rank = std::size_t(communicator.rank());
  std::string texts(longest * world, '\0');
  optimizer_.copy(&texts[rank * longest], longest);
  const Bytes all{reinterpret_cast<std::byte*>(texts.data()), texts.size(), DType::u8, Place::host, 0};
  communicator.all_gather(all.sub(rank * longest, longest), all);
  const auto of = [&](std::size_t r) {
    const std::string padded = texts.substr(r * longest, longest);
    return padded.substr(0, padded.find('\0'));
  };
  const std::string first = of(0);
  for (std::size_t r = 1; r < world; ++r) {
    const std::string other = of(r);
    if (other == first) continue;
    const std::size_t common = std::min(first.size(), other.size());
    const auto differ = std::mismatch(first.begin(), first.begin() + std::ptrdiff_t(common), other.begin());
    const std::size_t place = std::size_t(differ.first - first.begin());
    fail(Errc::invalid_argument,
         "rank " + std::to_string(r) + " and rank 0 have different optimizers: " + excerpt(other, place) + " and " + excerpt(first, place));
  }
}

/// Ranks that were set up differently would exchange buffers of different sizes: hangs or garbage. So the first thing a reducer ever
/// exchanges is who it is.
void GradientReducer::Impl::compare_cards(Communicator& communicator, const Standing& standing, const std::string& problem) const {
  struct Card {
    std::uint64_t parameters, count, step, step_verdict, config_hash, optimizer_hash, optimizer_bytes, freeze_at, handovers, joined, loaded;
    char config[472], problem[1024];
  };
  const int rank = communicator.rank(), world = communicator.size();
  std::vector<Card> cards(static_cast<std::size_t>(world));
  Card& own = cards[std::size_t(rank)];
  std::memset(&own, 0, sizeof own);
  const auto put = [](const std::string& text, std::span<char> into) {
    std::memcpy(into.data(), text.data(), std::min(text.size(), into.size() - 1));
  };
  own.parameters = own_fingerprint();
  own.count = slots_.size();
  own.step = standing.step;
  own.step_verdict = options_.step_verdict;
  const std::string text = config_.str();
  own.config_hash = wire::hash_bytes(text.data(), text.size(), 0);  // for texts that do not fit
  put(text, own.config);
  own.freeze_at = standing.freeze_at;
  own.loaded = standing.loaded;
  if (standing.at_step) {
    own.optimizer_hash = wire::hash_bytes(optimizer_.data(), optimizer_.size(), 0);
    own.optimizer_bytes = optimizer_.size();
    own.joined = standing.joined;
    for (const ParameterSlot& slot : slots_) {
      own.handovers = wire::hash_bytes(&slot.beta1, sizeof slot.beta1, own.handovers);
      own.handovers = wire::hash_bytes(slot.live.data(), slot.live.size(), own.handovers);
    }
  }
  put(problem, own.problem);
  const Bytes all{reinterpret_cast<std::byte*>(cards.data()), cards.size() * sizeof(Card), DType::u8, Place::host, 0};
  communicator.all_gather(all.sub(std::size_t(rank) * sizeof(Card), sizeof(Card)), all);

  bool same_handovers = true, same_optimizers = true;
  std::size_t longest = 1;
  for (int r = 0; r < world; ++r) {
    Card& other = cards[std::size_t(r)];
    other.config[sizeof other.config - 1] = other.problem[sizeof other.problem - 1] = '\0';
    if (other.problem[0] != '\0') fail(Errc::invalid_argument, "rank " + std::to_string(r) + " refused: " + other.problem);
    const Card& first = cards.front();  // everybody compares with rank 0, so everybody refuses with the same words
    const std::string who = "rank " + std::to_string(r) + " and rank 0 ";
    if (other.config_hash != first.config_hash)
      fail(Errc::invalid_config, who + "have different configs: '" + other.config + "' and '" + first.config + "'");
    if (other.parameters != first.parameters)
      fail(Errc::invalid_config, who + "have different parameters (" + std::to_string(other.count) + " and " + std::to_string(first.count) +
                                     " of them): " + first_difference(communicator, r, other.count, first.count));
    if (other.step != first.step)
      fail(Errc::invalid_config, who + "are at different steps, " + std::to_string(other.step) + " and " + std::to_string(first.step) +
                                     "; load checkpoints of the same step on all ranks");
    if (other.step_verdict != first.step_verdict) fail(Errc::invalid_config, who + "do not both use a grad scaler");
    if (other.freeze_at != first.freeze_at) {
      const auto frozen = [](const Card& card) {
        return (card.freeze_at == UINT64_MAX ? std::string("not frozen") : "frozen since step " + std::to_string(card.freeze_at)) +
               (card.joined != 0 ? " (and without data: DDP.join)" : "");
      };
      fail(Errc::invalid_argument,
           who + "do not agree at step " + std::to_string(first.step) + " whether the variance is frozen: " + frozen(other) + " and " +
               frozen(first) +
               ". Load the same checkpoint on all ranks; a rank that has run out of data takes no step and so cannot "
               "freeze: freeze at a step that all ranks take");
    }
    if (other.loaded != first.loaded)
      fail(Errc::invalid_argument, who +
                                       "have different mean estimates (H), or only one of them has a flush() ahead: all ranks of a "
                                       "checkpoint hold the same; load states of one checkpoint");
    same_optimizers &= other.optimizer_hash == first.optimizer_hash;
    same_handovers &= other.handovers == first.handovers;
    longest = std::max(longest, std::size_t(other.optimizer_bytes));
  }
  if (!same_optimizers) compare_optimizers(communicator, longest);
  if (!same_handovers) compare_handovers(communicator);
}

}  // namespace thinwire
