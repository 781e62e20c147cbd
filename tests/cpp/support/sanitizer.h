// sanitizer.h: what the instrumentation of this build cannot bear.
#pragma once

namespace mfa::testing {

// ThreadSanitizer does not follow threads that a child of fork() starts.
#if defined(__SANITIZE_THREAD__)
inline constexpr bool kThreadSanitizer = true;
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
inline constexpr bool kThreadSanitizer = true;
#else
inline constexpr bool kThreadSanitizer = false;
#endif
#else
inline constexpr bool kThreadSanitizer = false;
#endif

}  // namespace mfa::testing
