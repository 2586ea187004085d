// How many kernels a call of the sign codec is on a GPU: as many as sign_cuda.hpp says, however many segments and parts a plan has. Only in
// the emulator, which counts them.

#include <cuda_runtime.h>

#include "tests/sign_fixture.hpp"

namespace thinwire {
namespace {

template <class Call>
std::size_t kernels_of(Call&& call) {
  const std::size_t before = emulator::launches();
  call();
  return emulator::launches() - before;
}

TEST(SignLaunches, AreAsManyAsPromised) {
  for (const std::size_t block : {1024, 8192, 0}) {
    for (const Recursion& recursion : {no_feedback(), averaged(ef14()), econtrol(), ef21(0.5f)}) {
      const bool keeps = has_estimate(recursion) || recursion.averaged, feeds = recursion.control || recursion.averaged;
      SignOptions options;
      options.block = block;
      SignRig rig(Backend::gpu(), options, recursion, {9000, 100, 40000, 3, 20000}, {1, 2, 2, 5});
      rig.prepare();
      const std::vector<float> grad(rig.numel, 1.0f);
      const auto stream = [&](const PassCounts& counts) {
        return kernels_of([&] {
          rig.codec->stream(rig.recursion, rig.plan(), host_bytes(grad.data(), grad.size()), rig.state(), SignRig::bytes(rig.workspace),
                            SignRig::bytes(rig.payload), &rig.flags, counts, Stream::host());
        });
      };
      const std::size_t pass = block == 1024 ? 2 : keeps ? 4 : 3;
      EXPECT_EQ(stream({rig.kept.data(), nullptr}), pass);
      EXPECT_EQ(stream({rig.kept.data(), rig.norms.data()}), pass + 2);
      EXPECT_EQ(kernels_of([&] { rig.take_back(); }), feeds ? 1u : 0u);
      EXPECT_EQ(kernels_of([&] { rig.codec->empty(rig.plan(), SignRig::bytes(rig.payload), 0, Stream::host()); }), 1u);

      SignRig gathered(Backend::gpu(), options, no_feedback(), {9000, 100, 40000});
      gathered.stream(gradients(gathered.numel, 1, false));
      EXPECT_EQ(kernels_of([&] { gathered.decode(std::vector<std::vector<std::byte>>(9, gathered.payload)); }), 2u);
    }
  }
}

}  // namespace
}  // namespace thinwire
