#pragma once
// Simple loops are compiled once per ISA and chosen by the loader; their bits are equal because nothing is contracted or reassociated
// (-ffp-contract=off).

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)
#define THINWIRE_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define THINWIRE_CLONES  // ifunc resolvers run before a sanitizer's runtime is up
#endif
