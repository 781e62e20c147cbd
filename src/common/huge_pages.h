// huge_pages.h: pages of 2 MB for memory that others allocated and that is read again and again.
#pragma once

#include <cstddef>

namespace mfa {

// Has Linux move the memory to pages of 2 MB, now: contents and addresses stay, and a pass over it looks up a fraction
// of the addresses. Each page that the bytes lie on moves as a whole, with what else is on it. Does nothing where that
// is not to be had: memory that is not the process's own, other systems, one that was told never to use such pages.
void prefer_huge_pages(const void* data, size_t bytes);

// Memory that was just allocated and not written yet comes in pages of 2 MB, where whole ones fit: pages of 4 KB take
// longer to come than to be written.
void expect_huge_pages(const void* fresh, size_t bytes);

}  // namespace mfa
