/* error.h: the message of the calling thread's last failure, which tq_last_error returns. */
#ifndef TQI_ERROR_H
#define TQI_ERROR_H

/* Sets the message (printf style) and returns status. */
int tqi_fail(int status, const char * format, ...)
#if defined(__GNUC__)
    __attribute__((format(printf, 2, 3)))
#endif
    ;

#endif
