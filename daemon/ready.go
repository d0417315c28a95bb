package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// readyTimeout bounds the wait for the conditions. The holder of the node lock may be
// busy with another process for a second. That the node is served is known without
// them.
const readyTimeout = 2 * time.Second

// Ready returns nil if a signalbox of this PID namespace, and so of this container,
// holds the node lock: then all Services are in the kernel, and no earlier process
// writes there. Otherwise the error says who holds it. /healthz cannot tell: while two
// processes run on a node, the earlier one answers. conditions are the faults with
// which the holder serves on.
func Ready() (conditions []string, err error) { return ready(nodeLockName) }

func ready(name string) (conditions []string, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), readyTimeout)
	defer cancel()
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", name)
	if errors.Is(err, unix.ECONNREFUSED) {
		return nil, errors.New("not ready: no signalbox serves this node yet")
	}
	if err != nil {
		return nil, fmt.Errorf("not ready: cannot ask which signalbox serves this node: %w", err)
	}
	defer conn.Close()
	holder, err := peer(conn.(*net.UnixConn))
	if err != nil {
		return nil, fmt.Errorf("not ready: cannot tell which signalbox serves this node: %w", err)
	}
	if err := ours(holder); err != nil {
		return nil, err
	}
	return askConditions(ctx, conn), nil
}

// askConditions returns what the signalbox that serves the node answers in time.
func askConditions(ctx context.Context, conn net.Conn) []string {
	deadline, _ := ctx.Deadline()
	conn.SetDeadline(deadline)
	if err := send(conn.(*net.UnixConn), wordConditions); err != nil {
		return nil
	}
	text, _ := io.ReadAll(conn) // what came before an error is an answer, too
	return slices.Collect(strings.Lines(string(text)))
}

// ours returns nil if a peer is in this PID namespace. The kernel gives 0 for a
// process that has no number there (unix(7), pid_namespaces(7)).
func ours(holder *syscall.Ucred) error {
	if err := trustedUser(holder); err != nil {
		return fmt.Errorf("not ready: the process that holds the node lock is not signalbox: %w", err)
	}
	if holder.Pid == 0 {
		return errors.New("not ready: a signalbox of another container serves this node yet")
	}
	return nil
}
