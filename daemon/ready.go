package daemon

import (
	"context"
	"errors"
	"fmt"
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// readyTimeout bounds a question that only the kernel answers.
const readyTimeout = time.Second

// Ready returns nil if a signalbox of this PID namespace, which is to say of
// this container, has the seat of its network namespace: then all Services are
// in the kernel, and no earlier process writes there any more. Otherwise the
// error says who has it. /healthz cannot tell: while two run on a node it is
// answered by the earlier one.
func Ready() error { return ready(seatName) }

func ready(name string) error {
	ctx, cancel := context.WithTimeout(context.Background(), readyTimeout)
	defer cancel()
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", name)
	if errors.Is(err, unix.ECONNREFUSED) {
		return errors.New("not ready: no signalbox serves this node yet")
	}
	if err != nil {
		return fmt.Errorf("not ready: cannot ask which signalbox serves this node: %w", err)
	}
	defer conn.Close()
	holder, err := peer(conn.(*net.UnixConn))
	if err != nil {
		return fmt.Errorf("not ready: cannot tell which signalbox serves this node: %w", err)
	}
	return ours(holder)
}

// ours says whether a peer is in this PID namespace. The kernel gives 0 for a
// process that has no number there (unix(7), pid_namespaces(7)).
func ours(holder *syscall.Ucred) error {
	if err := trustedUser(holder); err != nil {
		return fmt.Errorf("not ready: what has the place of the signalbox that serves this node is none: %w", err)
	}
	if holder.Pid == 0 {
		return errors.New("not ready: a signalbox of another container serves this node yet")
	}
	return nil
}
