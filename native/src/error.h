/* error.h: the message of the calling thread's last failure, which tq_last_error returns. */
#ifndef TQI_ERROR_H
#define TQI_ERROR_H

/* Returns the status of a call from the function that it stands in, unless the status is TQ_OK. */
#define TQI_TRY(call)                                                                                                  \
    do {                                                                                                               \
        const int status_of_call = (call);                                                                             \
        if (status_of_call != TQ_OK) {                                                                                 \
            return status_of_call;                                                                                     \
        }                                                                                                              \
    } while (0)

/* Sets the message (printf style) and returns status. */
int tqi_fail(int status, const char * format, ...)
#if defined(__GNUC__)
    __attribute__((format(printf, 2, 3)))
#endif
    ;

#endif
