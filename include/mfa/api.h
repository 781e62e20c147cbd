// api.h: marks what the shared library exports.
#pragma once

#define MFA_API __attribute__((visibility("default")))
